"""python -m slimllm_nb.prune: one command for a model of one's own."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hub_folder import LAYERS, make_model, make_tokenizer
from slimllm_nb import evaluation, sources
from slimllm_nb.prune import halves, main

FEW = ["--samples", "6", "--length", "32", "--tokens", "256", "--device", "cpu"]


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder with a small LLaMA, and texts."""
    place, tokenizer = tmp_path_factory.mktemp("mine"), make_tokenizer()
    for part in (make_model(tokenizer).float(), tokenizer):
        part.save_pretrained(place / "llama")
    (place / "my.txt").write_text("\n\n".join(sources.load_texts("news", "calibration")[:40]), encoding="utf-8")
    return place


@pytest.mark.parametrize(("keep", "spread"), [("0.8", (6, 10.0)), ("0.6", (8, 7.0))])
def test_it_prunes_measures_and_says_how_to_go_on(mine, tmp_path, capsys, keep, spread):
    target = tmp_path / "pruned"
    texts = ["--texts", str(mine / "my.txt"), *(["--even-groups"] if keep == "0.6" else [])]
    assert main([str(mine / "llama"), str(target), "--keep", keep, "--of", "decoder", *texts, *FEW]) == 0
    said = capsys.readouterr().out
    method = "obs_heads_ridge" + (", head_selection=obs(even_groups=True)" if keep == "0.6" else "")
    assert f"{method}: {spread[0]} of {LAYERS} layers, alpha {spread[1]:g}; 6 samples of 32 tokens from" in said
    report = json.loads((target / "pruning_report.json").read_text())
    assert (report["pruned_layers"], report["alpha"]) == spread and report["target_parameters"] == float(keep)
    assert f'AutoModelForCausalLM.from_pretrained("{target}", trust_remote_code=True)' in said
    assert f'make serve CHECKPOINT="{target}"' in said
    blocks = evaluation.token_blocks(halves([str(mine / "my.txt")])[1], sources.load_tokenizer(str(target)), 32, 256)
    before, after = (
        evaluation.perplexity(AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32), blocks, progress=False)
        for one in (mine / "llama", target)
    )
    assert f"perplexity on 256 held-out tokens: {before:.2f} -> {after:.2f}" in said


def test_held_out_texts_are_others(mine):
    texts, held_out, _ = halves([str(mine / "my.txt")])
    assert texts and held_out and not set(texts) & set(held_out)
    texts, held_out, named = halves(None)
    assert named == "embedded news" and not set(texts) & set(held_out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "1.2"], "target_parameters is 1.2; allowed: above 0, up to 1"),
        (["--method", "slimlm"], "unknown method 'slimlm'"),
        (["--method", "llm_pruner"], "asks for gradients"),
        (["--texts", "nothing.txt"], "cannot read the text file nothing.txt"),
        (["--samples", "100000"], "100000 samples of 32 tokens were asked for"),
        (["--method", "flap", "--even-groups"], "head_selection 'lowest' has no option even_groups"),
        (["--channel-multiple", "4096"], "channel_multiple is 4096; allowed: 1 to 172"),
    ],
)
def test_what_it_refuses(mine, tmp_path, capsys, options, message):
    assert main([str(mine / "llama"), str(tmp_path / "pruned"), *FEW, *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "pruned").exists()
