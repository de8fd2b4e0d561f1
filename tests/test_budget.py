"""From ratios to counts of heads, channels and parameters."""

import pytest
import torch

from conftest import make_small_model
from slimllm_nb.llama import Widths, layer_widths
from slimllm_nb.methods import as_method
from slimllm_nb.methods.checked import checked_allocation
from slimllm_nb.pruning import prune
from slimllm_nb.pruning.budget import (
    PruningTarget,
    aligned,
    channels_for,
    check_met,
    removed_counts,
    unit_parameters,
)


def test_widths_of_a_layer(small_model):
    assert layer_widths(small_model.model.layers[0]) == Widths(8, small_model.config.num_key_value_heads, 80)


@pytest.mark.parametrize(
    ("ratio", "heads", "channels"),
    [(0.0, 0, 0), (0.25, 2, 384), (0.28, 3, 430), (0.5, 4, 768), (0.9999, 8, 1535), (1.7, 8, 1535)],
)
def test_counts_are_rounded_and_one_of_each_stays(ratio, heads, channels):
    assert removed_counts(Widths(heads=9, key_value_heads=3, channels=1536), ratio) == (heads, channels)


@pytest.mark.parametrize(("channels", "multiple"), [(80, 1), (80, 16), (80, 80), (100, 32)])
def test_no_other_multiple_of_channels_comes_nearer(channels, multiple):
    assert aligned(channels, 0, multiple) == 0
    for removed in range(1, channels):
        kept = channels - aligned(channels, removed, multiple)
        nearest = min(range(multiple, channels + 1, multiple), key=lambda one: abs(channels - removed - one))
        assert kept % multiple == 0 and abs(channels - removed - kept) == abs(channels - removed - nearest)


@pytest.mark.parametrize("amount", [{"pruning_ratio": 0.3}, {"target_parameters": 0.8, "target_of": "decoder"}])
def test_kept_channels_are_a_multiple_and_the_target_is_met(amount, generator):
    model = make_small_model(4, intermediate_size=1024, num_hidden_layers=6)
    ids = torch.randint(0, 101, (8, 10), generator=generator)
    options = amount | {"pruned_layers": 5, "alpha": 3.0, "progress": False, "channel_multiple": 32}
    pruned, report = prune(model, ids, **options)
    widths = [layer_widths(layer).channels for layer in pruned.model.layers]
    assert all(width % 32 == 0 for width in widths) and sum(width < 1024 for width in widths) == 5
    assert "channels in multiples of 32" in str(report) and report.channel_multiple == 32
    if "target_parameters" in amount:
        assert report.decoder.share_left == pytest.approx(0.8, abs=0.003)
    with pytest.raises(ValueError, match="channel_multiple is 2048; allowed: 1 to 1024, a layer's channels"):
        prune(model, ids, **options | {"channel_multiple": 2048})


def test_one_ratio_a_layer_is_that_of_heads_and_channels():
    one, apart = torch.tensor([0.1, 0.3]), torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    assert torch.equal(checked_allocation("mine", one, 2), torch.stack([one, one], 1).double())
    assert torch.equal(checked_allocation("mine", apart, 2), apart.double())


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("recover", [True, False])
def test_units_add_up_to_the_parameters_that_left(biases, recover, generator):
    model = make_small_model(4, attention_bias=biases, mlp_bias=biases)
    input_ids = torch.randint(0, 101, (8, 10), generator=generator)
    options = {"pruning_ratio": 0.5, "pruned_layers": 3, "alpha": 1.0, "progress": False}
    options["method"] = {"recovery": "regression" if recover else "none"}
    pruned, _ = prune(model, input_ids, **options)
    for before, after in zip(model.model.layers, pruned.model.layers, strict=True):
        old, new = layer_widths(before), layer_widths(after)
        gone = [getattr(old, name) - getattr(new, name) for name in ("heads", "key_value_heads", "channels")]
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in (before, after)]
        units = sum(number * size for number, size in zip(gone, unit_parameters(before), strict=True))
        new_biases = len(dict(after.named_parameters())) - len(dict(before.named_parameters()))
        assert new_biases == (2 if recover and gone[2] and not biases else 0)
        assert sizes[0] - sizes[1] == units - new_biases * before.hidden_size


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("removal", [-5000, 0, 50, 96, 97, 1000, 4321.5, 10**6])
def test_no_other_number_of_channels_comes_nearer(shift, removal):
    layer = make_small_model(4).model.layers[0]
    chosen = channels_for(layer, removal, shift)

    def distance(channels):
        added = layer.hidden_size if shift and channels else 0
        return abs(channels * unit_parameters(layer)[2] - added - removal)

    assert distance(chosen) == min(map(distance, range(80)))


@pytest.mark.parametrize("part", ["model", "decoder"])
@pytest.mark.parametrize("shift", [True, False])
def test_a_plan_removes_what_the_target_asks(part, shift):
    model = make_small_model(4, intermediate_size=1000, num_hidden_layers=6)
    known = {"similarity": torch.linspace(0.7, 0.9, 6)}
    method = as_method({"recovery": "regression" if shift else "none"})
    whole = model if part == "model" else model.model.layers
    total = sum(p.numel() for p in whole.parameters())
    before = None
    for target in (0.9, 0.75, 0.6):
        plan = PruningTarget(None, target, part, 5, 2.0).plan(method, model, known)
        assert plan.removals.sum() == pytest.approx((1 - target) * total, rel=1e-6)
        assert plan.removals[0] == 0 < min(plan.removals[1:])
        assert before is None or plan.pruning_ratio > before
        before = plan.pruning_ratio
    assert PruningTarget(None, 1.0, part, 5, 2.0).plan(method, model, known).pruning_ratio == 0


@pytest.mark.parametrize(
    ("part", "target", "message"),
    [
        ("model", 0.0, "target_parameters is 0.0; allowed: above 0, up to 1"),
        ("decoder", 1.2, "target_parameters is 1.2; allowed: above 0, up to 1"),
        ("head", 0.8, "target_of is 'head'; allowed: 'model', 'decoder'"),
    ],
)
def test_targets_that_are_none_are_refused(part, target, message):
    with pytest.raises(ValueError, match=message):
        PruningTarget(None, target, part, 3, 1.0).check(make_small_model(4))


def test_targets_out_of_reach_are_refused():
    with pytest.raises(ValueError, match=r"target_parameters is 0.1 of the decoder, but at least 0\.5\d+ of it stay"):
        out_of_reach = PruningTarget(None, 0.1, "decoder", 2, 0.0)
        out_of_reach.plan(as_method("slimllm"), make_small_model(8), {"similarity": torch.ones(4)})
    with pytest.raises(ValueError, match=r"0\.7 of the model, but 0\.7040 are left, not within 0\.003"):
        check_met(PruningTarget(None, 0.7, "model", 3, 1.0), {"model": 0.704})
    check_met(PruningTarget(None, 0.7, "model", 3, 1.0), {"model": 0.7029})
