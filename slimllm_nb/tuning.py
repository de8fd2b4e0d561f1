"""Recovery training: LoRA on a pruned model, merged back into its weights (paper section 5.1, the rows "w/ tune").

Beside every projection's weight W (out, in) stand two small matrices A (rank, in) and B (out, rank), and
W + alpha / rank * B A takes its place. B begins as zero, so training begins at the pruned model, and A and B alone are
trained. Merged, the model has the sizes it had: it is saved, exported and pruned again like any other.
"""

import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Int
from pydantic import BaseModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from slimllm_nb import checks
from slimllm_nb.files import begun
from slimllm_nb.fingerprint import digest
from slimllm_nb.llama import PROJECTIONS
from slimllm_nb.progress import bar as progress_bar
from slimllm_nb.recipe import IGNORED, Recipe
from slimllm_nb.sources.packages import needing_extra

with needing_extra("tuning", "training a pruned model"):
    from peft import LoraConfig, PeftModel, get_peft_model

Sample = tuple[Int[Tensor, "length"], Int[Tensor, "length"]]  # token ids; labels, IGNORED where no loss is wanted


class TuningReport(BaseModel):
    """tokens: that a loss was computed for, over all epochs. before, validation: the validation loss in nats a token,
    of the pruned model and by step; best_step: of the weights that were kept."""

    recipe: Recipe
    samples: int
    tokens: int
    steps: int
    before: float
    validation: dict[int, float]
    best_step: int
    seconds: float


@torch.enable_grad()
def tune(
    model: LlamaForCausalLM,
    samples: Sequence[Sample],
    *,
    recipe: Recipe | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[LlamaForCausalLM, TuningReport]:
    """Train on samples drawn with the seed, those held out apart; returns the same model, its weights changed, and a
    report. On an accelerator the activations of a layer are computed again when they are needed.

    folder: of what training leaves behind; called again with the same model, samples and settings, it goes on at the
    last evaluation. None: nothing stays.
    Raises: ValueError for a model that is not a plain LLaMA in memory, or on a CPU in half precision; for too few
    samples, and some that are longer than the model's limit; where the accelerator has too little memory left. All
    before training begins.
    """
    recipe = recipe or Recipe()
    _check(model, samples, recipe)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = [samples[index] for index in order[: recipe.held_out]]
    train = [samples[index] for index in order[recipe.held_out :][: recipe.samples]]
    with tempfile.TemporaryDirectory() as nowhere, _quiet():
        weights = [one.double().sum().item() for one in model.parameters()]
        key = digest(weights=weights, data=[train, held_out], recipe=recipe, seed=seed)
        place = begun(Path(folder or nowhere), key)
        set_seed(seed)
        names = [name for projections in PROJECTIONS.values() for name in projections.values()]
        options = {"r": recipe.rank, "lora_alpha": recipe.alpha, "lora_dropout": recipe.dropout}
        adapted = get_peft_model(model, LoraConfig(target_modules=names, task_type="CAUSAL_LM", **options))
        adapted.peft_config["default"].base_model_name_or_path = None  # else peft asks the hub for its vocabulary
        try:
            report = _train(adapted, train, held_out, _arguments(model, recipe, place, seed), recipe, progress)
            adapted.merge_and_unload()
        except BaseException:
            adapted.unload()
            raise
    return model.eval(), report


def _arguments(model: LlamaForCausalLM, recipe: Recipe, folder: Path, seed: int) -> TrainingArguments:
    at_once, often, here = min(recipe.at_once, recipe.batch_size), 1 / recipe.evaluations, model.device.type == "cpu"
    evaluated = {"eval_strategy": "steps", "eval_steps": often, "eval_on_start": True}
    kept = {"save_strategy": "steps", "save_steps": often, "save_total_limit": 1, "load_best_model_at_end": True}
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup,
        per_device_train_batch_size=at_once,
        per_device_eval_batch_size=at_once,
        gradient_accumulation_steps=max(recipe.batch_size // at_once, 1),
        fp16=model.dtype == torch.float16,  # scales the loss; bfloat16 needs none, and A and B are float32 in any case
        activation_checkpointing=not here,
        use_cpu=here,
        seed=seed,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        metric_for_best_model="eval_loss",
        **evaluated,
        **kept,
    )


def _train(adapted: PeftModel, train, held_out, arguments, recipe: Recipe, progress: bool) -> TuningReport:
    start, sets = time.perf_counter(), {"train_dataset": train, "eval_dataset": held_out, "data_collator": collate}
    trainer = Trainer(adapted, arguments, **sets, callbacks=[_Bar(progress)])
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output_dir))
    losses = {one["step"]: one["eval_loss"] for one in trainer.state.log_history if "eval_loss" in one}
    counted = sum(int((labels[1:] != IGNORED).sum()) for _, labels in train)
    return TuningReport(
        recipe=recipe,
        samples=len(train),
        tokens=round(counted * recipe.epochs),
        steps=trainer.state.global_step,
        before=losses.pop(0),
        validation=losses,
        best_step=min(losses, key=losses.get),
        seconds=round(time.perf_counter() - start, 1),
    )


def collate(samples: Sequence[Sample]) -> dict[str, Int[Tensor, "samples length"]]:
    """A batch, padded on the right."""
    ids, labels = zip(*samples, strict=True)
    mask = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
    padded = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    return {"input_ids": pad_sequence(ids, batch_first=True), "labels": padded, "attention_mask": mask}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what peft and the Trainer say of themselves."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(before)


class _Bar(TrainerCallback):
    """Our progress bar in the place of the Trainer's."""

    def __init__(self, progress: bool):
        self.progress = progress

    def on_train_begin(self, args, state, control, **_):
        options = {"total": state.max_steps, "initial": state.global_step, "progress": self.progress}
        self.bar = progress_bar(desc="LoRA", unit="step", **options)

    def on_step_end(self, args, state, control, **_):
        self.bar.update()

    def on_train_end(self, args, state, control, **_):
        self.bar.close()


def _check(model: LlamaForCausalLM, samples: Sequence[Sample], recipe: Recipe) -> None:
    checks.require_plain(model)
    checks.require_whole(model)
    if model.device.type == "cpu" and model.dtype != torch.float32:
        raise ValueError(f"the model is in {model.dtype} on the CPU; allowed: float32, or an accelerator")
    wanted = recipe.held_out + (recipe.samples or 1)
    if len(samples) < wanted:
        raise ValueError(f"{len(samples)} samples; {wanted} are needed, {recipe.held_out} of them held out")
    longest = max(len(ids) for ids, _ in samples)
    checks.require_length(model, longest, "samples")
    if model.device.type != "cpu":
        needed = tuning_bytes(model, recipe, longest)
        free = torch.accelerator.get_memory_info(model.device)[0]
        if free < needed:
            raise ValueError(
                f"training needs {needed / 1e9:.1f} GB beside the model, and {free / 1e9:.1f} GB are free: at_once is "
                f"{recipe.at_once}, set a smaller one"
            )


def tuning_bytes(model: LlamaForCausalLM, recipe: Recipe, length: int) -> float:
    """What training takes of an accelerator beside the model: every layer's input; one layer's activations, or the
    logits in float32, their logarithms and gradients; and 16 bytes for every number of A and B (itself, its gradient,
    Adam's moments). Within 15 % of what was counted on an H200 (data/gpu)."""
    config, tokens, size = model.config, min(recipe.at_once, recipe.batch_size) * length, model.dtype.itemsize
    projections = [
        module for layer in model.model.layers for module in layer.modules() if hasattr(module, "in_features")
    ]
    numbers = recipe.rank * sum(one.in_features + one.out_features for one in projections)
    hidden, channels = config.hidden_size, max(layer.mlp.down_proj.in_features for layer in model.model.layers)
    layer = 22 * hidden + 8 * channels
    return (
        tokens * (size * config.num_hidden_layers * hidden + max(size * layer, 12 * config.vocab_size)) + 16 * numbers
    )
