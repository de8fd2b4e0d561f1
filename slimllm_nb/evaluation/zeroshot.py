"""Zero-shot accuracy with lm-evaluation-harness, on the model in memory (paper section 5.1)."""

import copy
import io
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import lm_eval.tasks
import pandas
import torch
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from slimllm_nb.checks import evaluation_mode, require_fitting, require_llama
from slimllm_nb.devices import halved
from slimllm_nb.files import ROOT
from slimllm_nb.progress import followed
from slimllm_nb.sources.hub import in_local_datasets

TASK_FOLDER = ROOT / "data" / "tasks"
LOCAL = ("analogies", "continuation")  # need no hub
PAPER_FOLDERS = ("super_glue/boolq", "piqa", "hellaswag", "winogrande", "arc", "openbookqa")  # in lm-eval
LOGIT_BYTES = 1 << 30  # of one batch: in the weights' dtype, in float32, and their logarithms
PAPER = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


@dataclass(frozen=True)
class Row:
    """What the table says of a task: lm-eval's metric and the accuracy of guessing."""

    metric: str
    chance: float


# The paper names no metric; these fit its dense row (method.md, section 6).
ROWS = {
    "analogies": Row("acc", 0.25),
    "continuation": Row("acc", 0.25),
    "boolq": Row("acc", 0.5),
    "piqa": Row("acc", 0.5),
    "hellaswag": Row("acc_norm", 0.25),
    "winogrande": Row("acc", 0.5),
    "arc_easy": Row("acc", 0.25),
    "arc_challenge": Row("acc_norm", 0.25),
    "openbookqa": Row("acc_norm", 0.25),
}


class ZeroShotError(ValueError):
    """A task that cannot be had or asked; said before anything is scored."""


def zeroshot(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = LOCAL,
    *,
    limit: int | None = 100,
    batch_size: int | None = None,
    add_bos_token: bool | None = None,
    task_folder: str | Path = TASK_FOLDER,
    progress: bool = True,
) -> pandas.DataFrame:
    """One row per task: task, metric, accuracy, standard error, chance, majority and questions.

    tasks: names of lm-eval's tasks or of YAML files in task_folder; LOCAL need no hub, PAPER are the paper's seven.
    Of any other task its first metric is shown, as it is, and no chance (NaN). limit: the first so many questions of
    each task (None: all); standard error: lm-eval's, over the questions; chance: one over the number of choices;
    majority: the accuracy of always giving the answer that is right most often (0.6217 on BoolQ: a model below it has
    learnt nothing of use), NaN where no choice is offered. batch_size: questions at a time (8 on a CPU, 32 elsewhere);
    fewer where they are so long that their logits would take more than LOGIT_BYTES.
    add_bos_token: whether a beginning-of-sequence token stands in front of every question (None: as the tokenizer
    does). The model stays where it is, in its dtype.

    Raises: ValueError for an architecture other than LLaMA's or a tokenizer that does not fit; ZeroShotError for an
    unknown task, a task file that does not parse, a task without a metric, a task that needs the hub when it cannot be
    reached, and a question longer than the model's limit. All before the first question is scored.
    """
    require_llama(model)
    require_fitting(model, tokenizer)
    batch_size = (8 if model.device.type == "cpu" else 32) if batch_size is None else batch_size
    if not tasks or (limit is not None and limit < 1) or batch_size < 1:
        raise ValueError(
            f"tasks is {tasks!r}, limit {limit} and batch_size {batch_size}; "
            "allowed: at least one task, a limit from 1 (or None: all questions), a batch size from 1"
        )
    with _errors_only():
        loaded = {"tasks": _load_tasks(list(tasks), Path(task_folder)), "groups": {}, "group_map": {}}
        metrics = {name: _metric(name, task) for name, task in loaded["tasks"].items()}
        # lm-eval may give the tokenizer a padding token: a copy, so that the caller's stays as it is.
        stream = followed()
        harness = _Harness(model, copy.deepcopy(tokenizer), batch_size, add_bos_token, progress or stream is not None)
        # lm-eval has no switch for some of its bars.
        with (
            evaluation_mode(model),
            nullcontext() if progress and not stream else redirect_stderr(stream or io.StringIO()),
        ):
            found = evaluate(harness, loaded, limit=limit, log_samples=False)
    rows = []
    for task in tasks:
        questions = found["n-samples"][task]["effective"]
        one, metric = loaded["tasks"][task], metrics[task]
        rows.append(_row(task, metric, found["results"][task], _majority(one, questions), questions))
    return pandas.DataFrame(rows)


class _Harness(HFLM):
    """lm-eval's transformers model that refuses what is too long, instead of cutting it without a word, and halves the
    batch where memory runs out. Log-probabilities are float32: half precision is off by 0.1 to 0.7 nats a choice."""

    def __init__(self, model, tokenizer, batch_size: int, add_bos_token: bool | None, progress: bool):
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            add_bos_token=add_bos_token,
            softmax_dtype=torch.float32,
        )
        self.asked, self.progress = batch_size, progress

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        lengths = [len(context) + len(continuation) - 1 for _, context, continuation in requests]
        if (longest := max(lengths, default=0)) > self.max_length:
            raise ZeroShotError(f"a question has {longest} tokens, and the model's limit is {self.max_length} tokens")
        sizes, found = [self._at_once(length) for length in lengths], [None] * len(requests)
        for size in sorted(set(sizes)):
            numbers = [number for number, one in enumerate(sizes) if one == size]
            answers = self._answered([requests[number] for number in numbers], size, disable_tqdm or not self.progress)
            for number, answer in zip(numbers, answers, strict=True):
                found[number] = answer
        return found

    def _at_once(self, length: int) -> int:
        """How many questions of so many tokens: the batch size asked for, halved until their logits fit."""
        size, each = self.asked, length * self.model.config.vocab_size * (self.model.dtype.itemsize + 8)
        while size > 1 and size * each > LOGIT_BYTES:
            size //= 2
        return size

    def _answered(self, requests: list, size: int, quiet: bool) -> list:
        while True:
            self.batch_size_per_gpu = size
            with suppress(torch.OutOfMemoryError), torch.no_grad():  # what the failed run holds is free only behind it
                return super()._loglikelihood_tokens(requests, quiet)
            size = halved(size, "zero-shot")  # lm-eval begins with the longest


def _majority(task, questions: int) -> float:
    """The share of the most frequent right answer among the questions asked; NaN where no choice is offered."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return float("nan")
    # Where the choices stand in the middle of the sentence (WinoGrande), lm-eval keeps the answer in the text's place.
    answer = task.doc_to_text if task.multiple_input else task.doc_to_target
    counts = Counter(str(answer(document)) for document in islice(task.eval_docs, questions))
    return counts.most_common(1)[0][1] / questions


def _metric(name: str, task) -> str:
    """What the table shows of a task. Raises: ZeroShotError for one that measures nothing."""
    if name in ROWS:
        return ROWS[name].metric
    if not (metrics := list(task.aggregation())):
        raise ZeroShotError(f"the task {name!r} has no metric: give it a metric_list")
    return metrics[0]


def _row(task: str, metric: str, result: dict, majority: float, questions: int) -> dict:
    key = next(name for name in result if name.split(",")[0] == metric)  # behind the comma: lm-eval's filter
    return {
        "task": task,
        "metric": metric,
        "accuracy": result[key],
        "standard error": result.get(key.replace(metric, f"{metric}_stderr", 1), float("nan")),
        "chance": ROWS[task].chance if task in ROWS else float("nan"),
        "majority": majority,
        "questions": questions,
    }


def _load_tasks(names: list[str], folder: Path) -> dict:
    """lm-eval's task objects with their questions, by name."""
    files = _read_files(folder)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    managers = {name: manager if name in files else _own_tasks(name in PAPER) for name in names}
    for name, one in managers.items():
        if name not in one.all_subtasks:
            known = ", ".join([*files, *PAPER])
            raise ZeroShotError(f"unknown task {name!r}; allowed: {known}, and lm-eval's other single tasks")
    tasks = {}
    for name, one in managers.items():
        try:
            with in_local_datasets():
                tasks |= one.load([name])["tasks"]
        except Exception as error:  # no network shows itself as one of many kinds
            if name in files:
                raise ZeroShotError(f"cannot make the questions of task {name!r}: {error}") from error
            raise ZeroShotError(
                f"the task {name!r} needs the Hugging Face hub, and its questions cannot be had: check the network, or "
                f"take {' and '.join(LOCAL)}, which need none ({type(error).__name__}: {error})"
            ) from error
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
    return tasks


@cache
def _own_tasks(paper: bool) -> TaskManager:
    """lm-eval's own tasks: the paper's, or all; reading all files takes ten seconds and more."""
    if not paper:
        return TaskManager()
    folder = Path(lm_eval.tasks.__file__).parent
    return TaskManager(include_path=[str(folder / name) for name in PAPER_FOLDERS], include_defaults=False)


def _read_files(folder: Path) -> dict[str, Path]:
    """The folder's tasks by name. lm-eval would leave out in silence what it cannot read."""
    files = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            content = load_yaml(path, resolve_func=True)
        except Exception as error:  # YAML's own errors, a missing function, an error in the Python file beside it
            raise ZeroShotError(f"the task file {path} cannot be read: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("task"), str):
            raise ZeroShotError(f"the task file {path} has no line 'task: NAME'")
        files[content["task"]] = path
    return files


@contextmanager
def _errors_only() -> Iterator[None]:
    """lm-eval's notes on arguments that are not used would fill a notebook."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
