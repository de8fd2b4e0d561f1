"""Instructions: Alpaca's template, what the loss counts, what is cut."""

import pytest
from datasets import Dataset

from slimllm_nb.recipe import IGNORED
from slimllm_nb.reproduce.profiles import Profile, ProfileError, load_profile
from slimllm_nb.reproduce.tune import main, training_samples
from slimllm_nb.sources import SourceError, load_tokenizer
from slimllm_nb.sources.hub import HUB_VARIABLE
from slimllm_nb.sources.instructions import instruction_sample, load_instructions

ROWS = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Say hello.", "input": "", "output": "Hello!"},
]
ASKED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n"
    "### Response:\n",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nSay hello.\n\n### Response:\n",
)


@pytest.mark.parametrize(("row", "asked"), zip(ROWS, ASKED, strict=True))
def test_the_loss_counts_the_response_and_its_end(row, asked):
    tokenizer = load_tokenizer()
    ids, labels = instruction_sample(row, tokenizer, 256)
    counted = ids[labels != IGNORED]
    assert tokenizer.decode(ids) == asked + row["output"] + tokenizer.eos_token
    assert tokenizer.decode(counted) == row["output"] + tokenizer.eos_token
    assert (labels[labels != IGNORED] == counted).all() and (labels[: len(ids) - len(counted)] == IGNORED).all()
    short, cut = instruction_sample(row, tokenizer, 5)
    assert short.tolist() == ids[:5].tolist() and set(cut.tolist()) == {IGNORED}


def test_rows_come_from_the_hub_or_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(HUB_VARIABLE, str(tmp_path))
    folder = tmp_path / "datasets" / "some" / "instructions"
    folder.mkdir(parents=True)
    Dataset.from_list(ROWS).to_parquet(folder / "train.parquet")
    assert load_instructions("some/instructions") == ROWS
    other = tmp_path / "datasets" / "some" / "others"
    other.mkdir()
    Dataset.from_list([{"text": "a"}]).to_parquet(other / "train.parquet")
    with pytest.raises(SourceError, match="'some/others' has no column instruction, input, output; it has: text"):
        load_instructions("some/others")
    profile = load_profile("embedded")
    settings = profile.model_dump() | {"tuning": {"instructions": "some/instructions", "length": 30}}
    samples = training_samples(Profile.model_validate(settings), load_tokenizer())
    assert [len(ids) for ids, _ in samples] == [30, 30]


def test_what_a_profile_must_say(tmp_path, monkeypatch):
    profile = load_profile("embedded")
    with pytest.raises(ValueError, match="tune is true, but tuning does not say how"):
        Profile.model_validate(profile.model_dump() | {"tune": True, "tuning": None})
    with pytest.raises(ProfileError, match="profile embedded has no setting tuning"):
        training_samples(profile.model_copy(update={"tuning": None}), None)
    blocks = training_samples(profile, load_tokenizer())
    recipe = profile.tuning.recipe
    assert len(blocks) > recipe.samples + recipe.held_out and all(len(ids) == 128 for ids, _ in blocks)
    monkeypatch.setenv("SLIMLLM_NB_RUNS", str(tmp_path))
    assert main(["--settings", "30"]) == 2
    assert main(["--settings", "20"]) == 2  # nothing is pruned there yet
