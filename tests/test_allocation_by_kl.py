"""data/ablations/allocation_by_kl.py on a small model."""

from functools import partial

import pytest
import torch

from conftest import make_small_model
from slimllm_nb.methods import as_method
from slimllm_nb.pruning.prune import Layers, walk
from slimllm_nb.pruning.sublayers import Settings
from workplace import program


@pytest.fixture(scope="module")
def kl():
    return program("data/ablations/allocation_by_kl.py")


@torch.no_grad()
def test_exchanges_lower_the_divergence_and_keep_the_size(kl):
    model, generator = make_small_model(4), torch.Generator().manual_seed(0)
    samples, others = (torch.randint(0, 101, (12, 10), generator=generator) for _ in range(2))
    before = {name: one.clone() for name, one in model.state_dict().items()}
    step = partial(kl.level_step, Settings(as_method(kl.METHOD)))
    levels = [tensors for _, tensors in walk(Layers(model, 5), "levels", step, samples, False)]
    assert levels[1]["heads.3.weight"].count_nonzero(0).unflatten(0, (8, 4)).any(1).sum() == 5  # of 8 heads
    assert levels[1]["channels.2.weight"].any(0).sum() == 60  # of 80 channels
    assert torch.equal(levels[2]["channels.0.weight"], model.model.layers[2].mlp.down_proj.weight)
    masked = kl.Masked(model, levels, others)
    assert masked.divergence(masked.run(0)[-1]) == pytest.approx(0, abs=1e-6)
    chosen = {"heads": [0, 3, 3, 2], "channels": [1, 4, 4, 0]}
    found = kl.search(masked, chosen, {"heads": 7, "channels": 7}, 40, seed=0)
    assert found == sorted(found, reverse=True) and len(found) > 1
    assert (sum(chosen["heads"]), sum(chosen["channels"])) == (8, 9) and max(map(max, chosen.values())) <= 7
    # By hand: the model with these projections, over all tokens of a vocabulary, at every second position.
    for layer, heads, channels in zip(model.model.layers, *chosen.values(), strict=True):
        tensors = levels[layer.self_attn.layer_idx]
        for one, level in ((layer.self_attn.o_proj, f"heads.{heads}"), (layer.mlp.down_proj, f"channels.{channels}")):
            one.weight.copy_(tensors[f"{level}.weight"])
            one.bias = torch.nn.Parameter(tensors[f"{level}.bias"].clone())
    pruned = model(others).logits[:, ::2].softmax(-1)
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias = layer.mlp.down_proj.bias = None
    model.load_state_dict(before)
    dense = model(others).logits[:, ::2].softmax(-1)
    expected = (dense * (dense / pruned).log()).sum(-1).mean().item()
    assert found[-1] == pytest.approx(expected, rel=1e-4)
