"""The questions and what they do not give away; lm-eval on the model in memory and from its command line."""

import copy
import hashlib
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from slimllm_nb.evaluation import zeroshot as module
from slimllm_nb.evaluation.zeroshot import LOCAL, ROWS, TASK_FOLDER, ZeroShotError, zeroshot
from slimllm_nb.export import save_checkpoint
from slimllm_nb.files import ROOT
from slimllm_nb.pruning import prune
from slimllm_nb.reproduce import Profile, load_profile
from slimllm_nb.sources import load_model, load_texts, load_tokenizer, questions

MADE = {"analogies": questions.analogies, "continuation": questions.continuations}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def tiny():
    """A pruned random model with the embedded model's vocabulary."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        pad_token_id=2,
    )
    input_ids = torch.randint(0, 49152, (4, 16))
    dense = LlamaForCausalLM(config).eval()
    return prune(dense, input_ids, pruning_ratio=0.4, pruned_layers=2, alpha=1.0, progress=False)[0]


# --- questions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "count", "digest"),
    [("analogies", 550, "8eb8400047c324b4"), ("continuation", 209, "006e1363b0d61183")],
)
def test_questions_are_the_same_everywhere(task, count, digest):
    rows = MADE[task]()
    assert len(rows) == count
    assert hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()[:16] == digest
    assert len({row["query"] for row in rows}) == count


@pytest.mark.parametrize("task", LOCAL)
def test_neither_place_nor_length_tells_the_answer(task):
    rows = MADE[task]()
    assert all(len(set(row["choices"])) == 4 and 0 <= row["answer"] < 4 for row in rows)
    places = Counter(row["answer"] for row in rows)
    assert max(places.values()) - min(places.values()) <= 1
    error = math.sqrt(0.25 * 0.75 / len(rows))
    for picked in (max, min):
        right = sum(picked(row["choices"], key=len) == row["choices"][row["answer"]] for row in rows) / len(rows)
        assert abs(right - 0.25) < 2 * error, (task, picked, right)
    # Nor does the place in the first questions, which is what a notebook asks.
    assert max(Counter(row["answer"] for row in rows[:100]).values()) < 40


def test_analogies_ask_what_the_file_says():
    pairs = {pair for section in questions._sections().values() for pair in section}
    rows = questions.analogies()
    assert len({row["section"] for row in rows}) == 13
    for row in rows:
        words = row["query"].removesuffix(" is to").replace(", as ", " is to ").split(" is to ")
        assert len(words) == 5
        assert {(words[0], words[1]), (words[2], words[3])} <= pairs
        right = row["choices"][row["answer"]]
        assert [(words[4], choice) in pairs for choice in row["choices"]].count(True) == 1
        assert (words[4], right) in pairs
        assert not set(words) & (set(row["choices"]) - {right})


def test_continuations_are_held_out_and_come_next():
    documents = load_texts("news", "held-out")
    calibration = "\n".join(load_texts("news", "calibration"))
    rows = questions.continuations()
    for row in rows:
        right = row["choices"][row["answer"]]
        (document,) = [text for text in documents if f"{row['query']} {right}" in text]
        assert not any(choice in document for choice in row["choices"] if choice != right)
        lengths = [len(choice) for choice in row["choices"]]
        assert max(lengths) - min(lengths) <= 40
        assert not any(text.startswith(choice) for text in documents for choice in row["choices"])
    assert sum(row["query"] in calibration for row in rows) == 0


# --- lm-eval --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dense_embedded_model(tokenizer):
    table = zeroshot(load_model(), tokenizer, ("analogies",), limit=40, progress=False)
    assert list(table.columns) == ["task", "metric", "accuracy", "standard error", "chance", "majority", "questions"]
    (row,) = table.to_dict("records")
    assert (row["task"], row["metric"], row["chance"], row["questions"]) == ("analogies", "acc", 0.25, 40)
    assert row["accuracy"] == pytest.approx(0.85, abs=0.05)  # another CPU may answer a question or two differently
    assert row["standard error"] == pytest.approx((row["accuracy"] * (1 - row["accuracy"]) / 39) ** 0.5)


def test_accuracy_is_what_scoring_by_hand_gives(tiny, tokenizer):
    table = zeroshot(tiny, tokenizer, ("analogies",), limit=30, batch_size=7, progress=False)
    right = 0
    for row in questions.analogies()[:30]:
        scores = []
        for choice in row["choices"]:
            context = len(tokenizer(row["query"]).input_ids)
            ids = torch.tensor([tokenizer(f"{row['query']} {choice}").input_ids])
            with torch.no_grad():
                log = tiny(ids).logits[0, :-1].log_softmax(-1)
            scores.append(sum(log[i - 1, ids[0, i]].item() for i in range(context, ids.shape[1])))
        right += scores.index(max(scores)) == row["answer"]
    assert table["accuracy"].item() == pytest.approx(right / 30)
    again = zeroshot(tiny, tokenizer, ("analogies",), limit=30, batch_size=3, progress=False)
    pandas.testing.assert_frame_equal(table, again)


@pytest.mark.slow
def test_command_line_gives_the_same_accuracies(tiny, tokenizer, tmp_path):
    save_checkpoint(tiny, tokenizer, tmp_path / "model")
    command = [Path(sys.executable).with_name("lm_eval"), "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},trust_remote_code=True", "--batch_size", "8"]
    command += ["--include_path", TASK_FOLDER, "--tasks", *LOCAL, "--limit", "20", "--output_path", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(path.read_text())["results"]
    table = zeroshot(tiny, tokenizer, limit=20, progress=False)
    for row in table.to_dict("records"):
        assert found[row["task"]]["acc,none"] == row["accuracy"]
        assert found[row["task"]]["acc_stderr,none"] == pytest.approx(row["standard error"])


def test_log_probabilities_of_half_precision_are_summed_in_float32(tiny, tokenizer):
    model, context, choice = copy.deepcopy(tiny).bfloat16(), [5, 6, 7], list(range(100, 140))
    with torch.no_grad():
        logits = model(torch.tensor([context + choice[:-1]])).logits[0, len(context) - 1 :].double()
    exact = logits.log_softmax(-1)[range(len(choice)), choice].sum().item()
    harness = module._Harness(model, copy.deepcopy(tokenizer), 1, None, False)
    found = harness._loglikelihood_tokens([(("", ""), context, choice)])[0][0]
    assert found == pytest.approx(exact, abs=1e-3)


def test_fewer_long_questions_at_a_time(tiny, tokenizer, monkeypatch):
    whole = zeroshot(tiny, tokenizer, ["continuation"], limit=6, progress=False)
    sizes, forward = set(), tiny.forward

    def seen(ids, **options):
        sizes.add(len(ids))
        assert len(ids) == 1 or len(ids) * ids.shape[1] * 49152 * 12 <= module.LOGIT_BYTES
        return forward(ids, **options)

    monkeypatch.setattr(tiny, "forward", seen)
    monkeypatch.setattr(module, "LOGIT_BYTES", 400 * 49152 * 12)  # of 400 tokens
    fewer = zeroshot(tiny, tokenizer, ["continuation"], limit=6, batch_size=8, progress=False)
    assert max(sizes) < 8
    pandas.testing.assert_frame_equal(fewer, whole)


def test_memory_for_fewer_questions_at_a_time(tiny, tokenizer, monkeypatch):
    whole, forward = zeroshot(tiny, tokenizer, ["analogies"], limit=6, progress=False), tiny.forward

    def small(ids, **options):
        if len(ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(ids, **options)

    monkeypatch.setattr(tiny, "forward", small)
    with pytest.warns(UserWarning, match="zero-shot: out of memory; from here on 2 samples at a time"):
        fewer = zeroshot(tiny, tokenizer, ["analogies"], limit=6, batch_size=8, progress=False)
    pandas.testing.assert_frame_equal(fewer, whole)


def test_nothing_is_printed_and_nothing_changes(tiny, tokenizer, capsys):
    tokenizer.pad_token = None
    state = torch.get_rng_state()
    zeroshot(tiny, tokenizer, ("analogies",), limit=2, progress=False)
    assert capsys.readouterr() == ("", "")
    assert tokenizer.pad_token is None and torch.equal(torch.get_rng_state(), state)
    zeroshot(tiny, tokenizer, ("analogies",), limit=2)
    assert "requests: 100%" in capsys.readouterr().err


def test_kept_results_belong_to_the_profile_and_tell_models_apart():
    kept = json.loads((ROOT / "data" / "zeroshot" / "embedded.json").read_text(encoding="utf-8"))
    made_with = Profile.model_validate(kept["profile"])
    made_with, now = (one.model_dump(exclude={"tuning", "tune"}) for one in (made_with, load_profile("embedded")))
    assert made_with == now, "the profile has changed: run make zeroshot"
    rows = {(row["model"], row["task"]): row for row in kept["rows"]}
    assert rows.keys() == {(model, task) for model in ("dense", "20", "50") for task in LOCAL}
    for task in LOCAL:
        dense = rows["dense", task]
        assert dense["accuracy"] >= dense["chance"] + 3 * dense["standard error"]
        assert dense["questions"] == len(MADE[task]())
        assert dense["parameters"] > rows["20", task]["parameters"] > rows["50", task]["parameters"]
        # More than the noise of two independent samples; on the same questions it is less.
        assert dense["accuracy"] - rows["50", task]["accuracy"] > 2 * math.hypot(
            dense["standard error"], rows["50", task]["standard error"]
        )


def test_the_papers_rows():
    assert {task: ROWS[task].metric for task in module.PAPER} == {
        "boolq": "acc",
        "piqa": "acc",
        "hellaswag": "acc_norm",
        "winogrande": "acc",
        "arc_easy": "acc",
        "arc_challenge": "acc_norm",
        "openbookqa": "acc_norm",
    }


# --- bad input: said before a question is scored --------------------------------------------------------------------


@pytest.fixture
def unscored(monkeypatch):
    def scored(*_, **__):
        raise AssertionError("a question was scored")

    monkeypatch.setattr(LlamaForCausalLM, "forward", scored)


def task_file(folder, text) -> Path:
    (folder / "mine.yaml").write_text(text)
    return folder


MINE = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{query}}"
doc_to_choice: choices
doc_to_target: answer
"""


def test_a_task_file_of_your_own(tiny, tokenizer, tmp_path):
    rows = questions.analogies()[:5]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task_file(tmp_path, MINE.replace("FILE", str(tmp_path / "mine.jsonl")))
    table = zeroshot(tiny, tokenizer, ["mine"], task_folder=tmp_path, progress=False)
    expected = zeroshot(tiny, tokenizer, ["analogies"], limit=5, progress=False)
    assert table["accuracy"].item() == expected["accuracy"].item()
    assert table["questions"].item() == 5 and math.isnan(table["chance"].item())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [mine", r"the task file .*mine\.yaml cannot be read: "),
        ("task: mine\ndoc_to_text: !function nowhere.at_all\n", r"mine\.yaml cannot be read: .*nowhere"),
        ("name: mine\n", r"mine\.yaml has no line 'task: NAME'"),
        (MINE.replace("FILE", "missing.jsonl"), "cannot make the questions of task 'mine': .*missing.jsonl"),
    ],
)
def test_bad_task_file(text, message, tiny, tokenizer, tmp_path, unscored):
    with pytest.raises(ZeroShotError, match=message):
        zeroshot(tiny, tokenizer, ["mine"], task_folder=task_file(tmp_path, text))


@pytest.mark.slow
def test_unknown_task(tiny, tokenizer, unscored):
    with pytest.raises(ZeroShotError, match="unknown task 'arc_simple'; allowed: analogies, continuation, boolq"):
        zeroshot(tiny, tokenizer, ["analogies", "arc_simple"])


def test_a_task_that_needs_the_hub_without_network(tiny, tokenizer, unscored, monkeypatch):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ZeroShotError, match=r"'piqa' needs the Hugging Face hub.* take analogies and continuation"):
        zeroshot(tiny, tokenizer, ["analogies", "piqa"])


def test_questions_longer_than_the_models_limit(tiny, tokenizer, unscored, monkeypatch):
    monkeypatch.setattr(tiny.config, "max_position_embeddings", 64)
    with pytest.raises(ZeroShotError, match=r"a question has \d\d+ tokens, and the model's limit is 64 tokens"):
        zeroshot(tiny, tokenizer, ("analogies", "continuation"))


def test_models_and_tokenizers_that_do_not_fit(tiny, tokenizer, unscored):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(ValueError, match="architecture 'qwen2'"):
        zeroshot(Qwen2ForCausalLM(Qwen2Config(vocab_size=49152, **small)), tokenizer)
    with pytest.raises(ValueError, match="the tokenizer gives tokens 0 to 49151, the model's vocabulary is 0 to 999"):
        zeroshot(LlamaForCausalLM(LlamaConfig(vocab_size=1000, **small)), tokenizer)


@pytest.mark.parametrize("bad", [{"tasks": ()}, {"limit": 0}, {"batch_size": 0}], ids=str)
def test_bad_settings(bad, tiny, tokenizer, unscored):
    with pytest.raises(ValueError, match="allowed: at least one task, a limit from 1"):
        zeroshot(tiny, tokenizer, **bad)
