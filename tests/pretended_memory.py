"""What notebook 06 holds at its peak on the pretend accelerator, against what is announced before a run. Shapes in
which weights are most of it, as in LLaMA-7B. Not collected by itself: see test_pretend.py."""

from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import hub_folder
import pretend
from slimllm_nb.files import ROOT
from slimllm_nb.reproduce import cost, load_profile

pretend.install()
CELLS = nbformat.read(ROOT / "notebooks" / "06_evaluation.ipynb", 4).cells


@pytest.fixture(scope="module")
def tokenizer():
    return hub_folder.make_tokenizer()


def write_profile(place: Path, tokenizer, hidden: int, channels: int, method: str, dtype: str) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=hub_folder.VOCABULARY, hidden_size=hidden, intermediate_size=channels, num_hidden_layers=4,
        num_attention_heads=4, initializer_range=0.05, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    settings = {
        "20": {"target_parameters": 0.8, "pruned_layers": 3, "alpha": 1, "checkpoint": "mild"},
        "50": {"target_parameters": 0.5, "pruned_layers": 4, "alpha": 1, "checkpoint": "strong"},
    }
    content = {"name": "shape", "description": "a shape", "model": "model", "device": "auto", "dtype": dtype, "seed": 1}
    content |= {"calibration": {"corpus": "news", "num_samples": 8, "length": 16}, "settings": settings}
    content |= {"evaluation": {"corpora": ["wikipedia"], "block_length": 16, "max_tokens": 64}, "method": method}
    (place / "shape.yaml").write_text(yaml.safe_dump(content))
    return str(place / "shape.yaml")


@pytest.mark.parametrize(("hidden", "channels", "dtype"), [(256, 688, "bfloat16"), (384, 1032, "float32")])
@pytest.mark.parametrize("method", ["slimllm", "obs_ridge", "llm_pruner"])
def test_memory_is_what_is_announced(method, hidden, channels, dtype, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMLLM_NB_RUNS", str(tmp_path / "runs"))
    path = write_profile(tmp_path, tokenizer, hidden, channels, method, dtype)
    pretend.state.peak, names = pretend.state.live, {}
    before = pretend.state.live
    for cell in CELLS:
        if cell.cell_type == "code":
            exec(cell.source.replace('profile = "embedded"', f"profile = {path!r}"), names)
        if "pruned_models[percent] = pruned" in cell.source:
            break
    announced = cost.estimate(load_profile(path), on_device=True).device * 1e9
    print(
        f"{method}, {hidden} x {channels}, {dtype}: {pretend.state.peak - before:,} counted, {announced:,.0f} announced"
    )
    assert announced == pytest.approx(pretend.state.peak - before, rel=0.15)
