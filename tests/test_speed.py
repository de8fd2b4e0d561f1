"""Counts against what torch counts and caches; times against a clock that the test sets."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from conftest import make_small_model
from slimllm_nb.evaluation import bytes_on_disk, key_value_bytes_per_token, macs_per_token, speed
from slimllm_nb.evaluation.speed import FIRST_TOKEN, measure_speed
from slimllm_nb.pruning import prune


@pytest.fixture
def pruned(small_model):
    small_model.set_attn_implementation("eager")  # its products are all seen by torch's counter
    input_ids = torch.randint(0, 101, (6, 10), generator=torch.Generator().manual_seed(0))
    return prune(small_model, input_ids, pruning_ratio=0.4, pruned_layers=3, alpha=2.0, progress=False)[0]


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 7, 32])
def test_macs_are_half_of_what_torch_counts(small_model, pruned, tokens):
    found = []
    for model in (small_model, pruned):
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
        # Scores above the diagonal are computed as well, so every token attends to all of them.
        assert counter.get_total_flops() == 2 * tokens * macs_per_token(model, context=tokens)
        found.append(macs_per_token(model, context=tokens))
    assert found[1] < found[0]


def test_macs_of_a_tied_output_head():
    untied, tied = make_small_model(4), make_small_model(4, tie_word_embeddings=True)
    assert macs_per_token(untied) == macs_per_token(tied)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_what_the_cache_holds(small_model, pruned, dtype):
    for model in (small_model.to(dtype), pruned.to(dtype)):
        cache = model(torch.zeros(3, 5, dtype=torch.long)).past_key_values
        held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
        assert key_value_bytes_per_token(model) == held / (3 * 5)


def test_bytes_on_disk(pruned, tmp_path):
    pruned.save_pretrained(tmp_path / "one")
    pruned.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    weights = sum(p.nbytes for p in pruned.parameters())
    assert 0 < bytes_on_disk(tmp_path / "one") - weights < 10_000  # the header
    assert 0 < bytes_on_disk(tmp_path / "many") - weights < 30_000
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        bytes_on_disk(tmp_path)


def test_table_and_order(monkeypatch):
    """A clock that only the forward passes move: by their own cost, times what slows the machine down."""
    clock = {"now": 0.0, "load": 1.0}
    order = []
    models = {"dense": make_small_model(4), "pruned": make_small_model(4)}
    for name, cost in (("dense", 0.2), ("pruned", 0.3)):

        def forward(ids, *, forward=models[name].forward, name=name, cost=cost, **kwargs):
            order.append((name, tuple(ids.shape)))
            clock["now"] += cost * len(order) * ids.shape[1]  # the machine gets slower and slower
            return forward(ids, **kwargs)

        monkeypatch.setattr(models[name], "forward", forward)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock["now"])
    table = measure_speed(models, batch_sizes=(1, 2), prompt_length=6, new_tokens=3, repeats=2, progress=False)
    assert list(table.columns) == ["model", "batch", "measure", "median", "lowest", "highest", "speed-up"]
    # One run: the prompt, then two tokens. Batches of 1 and 2, the models in turning order, one round to warm up.
    runs = [(name, size) for names in (("dense", "pruned"), ("pruned", "dense")) for size in (1, 2) for name in names]
    runs = runs + runs[:4]
    expected = [(name, (size, length)) for name, size in runs for length in (6, 1, 1)]
    assert order == expected
    # By hand, from the same clock.
    steps = [(0.2 if name == "dense" else 0.3) * (i + 1) * n for i, (name, (_, n)) in enumerate(expected)]
    taken = {}
    for run, (name, size) in list(enumerate(runs))[4:]:
        first, *later = steps[3 * run : 3 * run + 3]
        taken.setdefault((name, size), []).append((first, size * 2 / sum(later)))
    for row in table.to_dict("records"):
        index = 0 if row["measure"] == FIRST_TOKEN else 1
        own, base = ([run[index] for run in taken[name, row["batch"]]] for name in (row["model"], "dense"))
        assert row["median"] == pytest.approx(sum(own) / 2)
        assert (row["lowest"], row["highest"]) == pytest.approx((min(own), max(own)))
        ratio = sum(a / b for a, b in zip(own, base, strict=True)) / 2
        assert row["speed-up"] == pytest.approx(1 / ratio if index == 0 else ratio)
        assert row["speed-up"] == 1 if row["model"] == "dense" else row["speed-up"] < 0.9


def test_a_real_run_says_what_it_measured(pruned):
    table = measure_speed(
        {"pruned": pruned}, batch_sizes=(2,), prompt_length=8, new_tokens=3, repeats=3, progress=False
    )
    assert table["measure"].tolist() == ["time to first token (s)", "tokens per second"]
    assert (table["lowest"] <= table["median"]).all() and (table["median"] <= table["highest"]).all()
    assert (table["lowest"] > 0).all() and table["speed-up"].tolist() == [1.0, 1.0]


BAD = [{"repeats": 0}, {"new_tokens": 1}, {"batch_sizes": ()}, {"batch_sizes": (0,)}, {"prompt_length": 0}]


@pytest.mark.parametrize("settings", BAD, ids=str)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="allowed: at least one model and batch size"):
        measure_speed({"dense": make_small_model(4)}, **settings)


def test_bad_models():
    with pytest.raises(ValueError, match="0 models"):
        measure_speed({})
    with pytest.raises(ValueError, match="make 40 tokens; the limit of the model 'short' is 32"):
        measure_speed({"short": make_small_model(4, max_position_embeddings=32)}, prompt_length=30, new_tokens=10)
    qwen = Qwen2ForCausalLM(Qwen2Config(vocab_size=9, hidden_size=32, intermediate_size=64, num_hidden_layers=1))
    for function in (macs_per_token, key_value_bytes_per_token, lambda model: measure_speed({"other": model})):
        with pytest.raises(ValueError, match="architecture 'qwen2'"):
            function(qwen)
