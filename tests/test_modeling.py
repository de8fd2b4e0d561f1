"""The model class: what transformers expects of it, and a checkpoint that another process loads without the package."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import make_small_model
from slimllm_nb.export import logits_elsewhere
from slimllm_nb.modeling import SlimLlamaConfig, SlimLlamaForCausalLM, _Expanding
from slimllm_nb.pruning import prune
from slimllm_nb.sources import SourceError, load_model

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

# Runs where the package cannot be imported, as in a user's own project.
RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM

sys.modules["slimllm_nb"] = None  # importing it now raises ImportError
inputs, *folders = sys.argv[1:]
ids = torch.load(inputs, weights_only=True)
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        generated = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        torch.save({"logits": model(ids).logits, "generated": generated}, folder + ".pt")
    model.save_pretrained(folder + "-again")
"""


@pytest.fixture
def input_ids(generator):
    return torch.randint(0, 101, (6, 10), generator=generator)


def prune_small(model, input_ids):
    return prune(model, input_ids, pruning_ratio=0.4, pruned_layers=3, alpha=2.0, progress=False)[0]


@pytest.fixture
def pruned(small_model, input_ids):
    return prune_small(small_model, input_ids)


def test_key_value_heads_are_repeated_for_their_own_query_heads():
    states = torch.tensor([[[[1.0]], [[2.0]], [[3.0]]]])  # (batch, key_value_heads, length, head_dim)
    assert _Expanding(None, [2, 1, 3]).update(states, states, 0)[0].flatten().tolist() == [1, 1, 2, 3, 3, 3]


@pytest.mark.slow
def test_what_cannot_be_loaded_elsewhere_is_said(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)nothing: loading them elsewhere failed:.*nothing"):
        logits_elsewhere([tmp_path / "nothing"], torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.slow
@torch.no_grad()
def test_another_process_reloads_it_without_the_package(input_ids, tmp_path):
    models = {str(tmp_path / str(count)): prune_small(make_small_model(count), input_ids) for count in (8, 4, 2)}
    for folder, model in models.items():
        model.save_pretrained(folder)
    torch.save(input_ids, tmp_path / "inputs.pt")
    arguments = [sys.executable, "-c", RELOAD, str(tmp_path / "inputs.pt"), *models]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder, model in models.items():
        reloaded = torch.load(f"{folder}.pt", weights_only=True)
        assert torch.equal(reloaded["logits"], model(input_ids).logits)
        assert torch.equal(reloaded["generated"], model.generate(input_ids, **GREEDY))
        # What was reloaded can be saved again, with its code and the same weights.
        folder, again = Path(folder), Path(f"{folder}-again")
        assert (again / "modeling.py").read_text() == (folder / "modeling.py").read_text()
        first, second = load_file(folder / "model.safetensors"), load_file(again / "model.safetensors")
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def test_with_the_package_it_needs_no_remote_code(pruned, input_ids, tmp_path):
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is SlimLlamaForCausalLM
    assert torch.equal(loaded(input_ids).logits, pruned(input_ids).logits)
    assert torch.equal(load_model(str(tmp_path))(input_ids).logits, pruned(input_ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_generation_equals_generation_without_cache(pruned, input_ids, cache):
    expected = pruned.generate(input_ids, **GREEDY, use_cache=False)
    found = pruned.generate(input_ids, **GREEDY, cache_implementation=cache)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_left_padding_does_not_change_what_is_generated(pruned, input_ids):
    alone = pruned.generate(input_ids[:1, 4:], **GREEDY)[0, 6:]
    padded = input_ids[:2].clone()
    padded[0, :4] = 0
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    assert torch.equal(pruned.generate(padded, attention_mask=mask, **GREEDY)[0, 10:], alone)


@torch.no_grad()
def test_the_cache_holds_the_key_value_heads_that_are_left(pruned, input_ids):
    cache = pruned(input_ids, use_cache=True).past_key_values
    for layer, cached in zip(pruned.model.layers, cache.layers, strict=True):
        assert cached.keys.shape == (6, layer.self_attn.k_proj.out_features // 4, 10, 4)


@torch.no_grad()
def test_attention_implementations_agree(small_model, input_ids):
    settings = {"pruning_ratio": 0.4, "pruned_layers": 3, "alpha": 2.0, "progress": False}
    small_model.set_attn_implementation("eager")
    eager, _ = prune(small_model, input_ids, **settings)
    expected = eager(input_ids).logits
    eager.set_attn_implementation("sdpa")
    assert (eager(input_ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_unpruned_it_is_a_stock_llama(input_ids):
    stock = make_small_model(4)
    config = SlimLlamaConfig(**{k: v for k, v in stock.config.to_dict().items() if k != "model_type"})
    slim = SlimLlamaForCausalLM(config).eval()
    slim.load_state_dict(stock.state_dict())
    assert torch.equal(slim(input_ids).logits, stock(input_ids).logits)


def test_the_config_says_what_each_layer_is(pruned, tmp_path):
    pruned.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == "slim_llama"
    assert config.auto_map["AutoModelForCausalLM"] == "modeling.SlimLlamaForCausalLM"
    for index, layer in enumerate(pruned.model.layers):
        own = config.per_layer_config[index]
        assert own.num_attention_heads * 4 == layer.self_attn.q_proj.out_features
        assert own.num_key_value_heads * 4 == layer.self_attn.k_proj.out_features
        assert own.intermediate_size == layer.mlp.gate_proj.out_features
        assert own.o_proj_bias == (layer.self_attn.o_proj.bias is not None)
        assert own.down_proj_bias == (layer.mlp.down_proj.bias is not None)


def test_gradients_reach_every_weight(pruned, input_ids):
    pruned.requires_grad_(True)
    pruned(input_ids, labels=input_ids).loss.backward()
    assert [name for name, p in pruned.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_a_missing_shard_is_named(pruned, tmp_path):
    pruned.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(SourceError, match=shards[1].name):
        load_model(str(tmp_path))
