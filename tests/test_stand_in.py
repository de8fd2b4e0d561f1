"""All notebooks on another shape of LLaMA: small, multi-head, with random weights and a tokenizer made on the spot."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slimllm_nb.reproduce import load_profile
from slimllm_nb.sources import load_texts
from test_ground import NOTEBOOKS

LAYERS, HEADS = 6, 4


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 1,000 tokens, trained on news."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(load_texts("news", "calibration"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": LAYERS}
    special = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, **special, num_attention_heads=HEADS, initializer_range=0.1)).eval()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The command on a profile of one's own; where it ran, and what it printed."""
    folder = tmp_path_factory.mktemp("stand-in")
    make_model().save_pretrained(folder / "llama")
    make_tokenizer().save_pretrained(folder / "llama")
    profile = load_profile("embedded").model_dump(mode="json")
    profile |= {"name": "stand-in", "description": "a small random LLaMA", "model": str(folder / "llama")}
    for setting, layers in zip(profile["settings"].values(), (4, 5), strict=True):
        setting["pruned_layers"] = layers
    profile["settings"]["50"]["alpha"] = 6.5  # no notebook may rely on the default profile's
    (folder / "stand-in.yaml").write_text(yaml.safe_dump(profile))
    command = [sys.executable, "-m", "slimllm_nb.reproduce", "--profile", str(folder / "stand-in.yaml")]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SLIMLLM_NB_RUNS", str(folder / "runs"))
        done = subprocess.run([*command, "-p", "questions=4"], capture_output=True, text=True)
    return folder / "runs" / "stand-in", done


@pytest.mark.notebook
def test_all_notebooks_end_well(finished):
    folder, done = finished
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sorted(path.stem for path in folder.glob("*.ipynb")) == NOTEBOOKS
    assert (folder / "model" / "model.safetensors").is_file() and (folder / "model-50" / "modeling.py").is_file()


@pytest.mark.notebook
def test_no_claim_fails_the_run_and_what_was_not_measured_says_so(finished):
    folder, _ = finished
    results = json.loads((folder / "results.json").read_text())
    verdicts = {one["id"]: one["verdict"] for one in results["verdicts"]}
    assert results["profile"] == "stand-in"
    # Laws hold on any model; no accuracies are kept for this one.
    for law in ("greedy-never-worse", "feature-space-factor", "regression-lowers-error"):
        assert verdicts[law] == "holds"
    for missing in ("accuracy-above-chance", "accuracy-20-above-50", "greedy-lowers-perplexity-50"):
        assert verdicts[missing] == "not run"


@pytest.mark.notebook
def test_the_card_names_the_model_that_was_pruned(finished):
    card = (finished[0] / "model" / "README.md").read_text()
    assert "# llama, pruned with SlimLLM" in card and "SmolLM2" not in card and "apache" not in card
