"""On the pretend accelerator prune() chooses as on the CPU, gives the same weights, and takes parts that do not know of
devices. Not collected by itself: see test_pretend.py."""

import pytest
import torch

import pretend
from conftest import make_small_model
from slimllm_nb.methods import method_names
from slimllm_nb.pruning import prune

pretend.install()
SETTINGS = {"pruning_ratio": 0.4, "pruned_layers": 3, "alpha": 2.0, "progress": False}


@pytest.fixture
def input_ids(generator):
    return torch.randint(0, 101, (16, 10), generator=generator)


def both(model, input_ids, **settings):
    """The kept heads and channels and the weights, on the CPU and on the pretend accelerator."""
    found = []
    for device in ("cpu", "pretend"):
        pruned, report = prune(model.to(device), input_ids, **SETTINGS, **settings)
        assert {one.device.type for one in pruned.parameters()} == {device}
        kept = [(layer.kept_heads, layer.kept_channels) for layer in report.layers]
        found.append((kept, {name: one.cpu() for name, one in pruned.state_dict().items()}))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key_value_heads", [8, 2])
@pytest.mark.parametrize("method", method_names())
def test_the_same_as_on_the_cpu(method, key_value_heads, dtype, input_ids):
    # The CPU's fused attention has no counterpart in the pretended backward pass: gradients would round differently.
    attention = "eager" if method == "llm_pruner" else "sdpa"
    model = make_small_model(key_value_heads, attn_implementation=attention).to(dtype)
    (kept, weights), (other, others) = both(model, input_ids, method=method)
    assert kept == other
    assert all(torch.equal(one, others[name]) for name, one in weights.items())


def on_the_cpu(scores):
    return scores.double().cpu()


PARTS = {
    "head_score": lambda output_weight, head_dim: on_the_cpu(
        output_weight.norm(dim=0).unflatten(0, (-1, head_dim))[:, 0]
    ),
    "channel_score": lambda output_weight: on_the_cpu(output_weight.norm(dim=0)),
    "head_selection": lambda scores, num_pruned: on_the_cpu(scores).argsort()[num_pruned:].sort().values,
    "channel_selection": lambda output_weight, num_pruned: torch.arange(num_pruned, output_weight.shape[1]),
    "allocation": lambda num_layers: torch.full((num_layers,), 0.3),
    "recovery": lambda output_weight: (torch.ones(len(output_weight)), torch.zeros(len(output_weight))),
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_part_that_returns_cpu_tensors(kind, input_ids):
    (kept, weights), (other, others) = both(make_small_model(4), input_ids, method={kind: PARTS[kind]})
    assert kept == other
    assert all(torch.equal(one, others[name]) for name, one in weights.items())
