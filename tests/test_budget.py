"""From ratios to counts of heads, channels and parameters."""

import pytest
import torch

from conftest import make_small_model
from slimllm_nb import ratios
from slimllm_nb.budget import Widths, find_ratio, layer_widths, removed_counts, removed_parameters
from slimllm_nb.evaluation import count_parameters
from slimllm_nb.pruning import prune


def test_widths_of_a_layer(small_model):
    assert layer_widths(small_model.model.layers[0]) == Widths(8, small_model.config.num_key_value_heads, 80)


@pytest.mark.parametrize(
    ("ratio", "heads", "channels"),
    [(0.0, 0, 0), (0.25, 2, 384), (0.28, 3, 430), (0.5, 4, 768), (0.9999, 8, 1535), (1.7, 8, 1535)],
)
def test_counts_are_rounded_and_one_of_each_stays(ratio, heads, channels):
    assert removed_counts(Widths(heads=9, key_value_heads=3, channels=1536), ratio) == (heads, channels)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("recover", [True, False])
def test_removed_parameters_are_those_that_left(biases, recover, generator):
    model = make_small_model(4, attention_bias=biases, mlp_bias=biases)
    input_ids = torch.randint(0, 101, (8, 10), generator=generator)
    options = {"pruning_ratio": 0.5, "pruned_layers": 3, "alpha": 1.0, "recover": recover, "progress": False}
    pruned, _ = prune(model, input_ids, **options)
    for before, after in zip(model.model.layers, pruned.model.layers, strict=True):
        old, new = layer_widths(before), layer_widths(after)
        gone = [getattr(old, name) - getattr(new, name) for name in ("heads", "key_value_heads", "channels")]
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in (before, after)]
        assert sizes[0] - sizes[1] == removed_parameters(before, *gone, shift=recover)


@pytest.mark.parametrize("part", ["model", "decoder"])
def test_found_ratio_meets_the_target(part):
    model = make_small_model(8, intermediate_size=1000, num_hidden_layers=6)
    similarity = torch.linspace(0.7, 0.9, 6)

    def allocation(ratio):
        return ratios.allocate(similarity, ratio, 5, 2.0)

    for target in (0.9, 0.75, 0.6):
        ratio = find_ratio(allocation, model, target, part, [0] * 6, shift=True)
        left = count_parameters(model)[part]
        for layer, own in zip(model.model.layers, allocation(ratio).tolist(), strict=True):
            heads, channels = removed_counts(layer_widths(layer), own)
            left -= removed_parameters(layer, heads, heads, channels, shift=True)
        assert left / count_parameters(model)[part] == pytest.approx(target, abs=0.003)


@pytest.mark.parametrize(
    ("part", "target", "message"),
    [
        ("model", 0.0, "target_parameters is 0.0; allowed: above 0, up to 1"),
        ("decoder", 1.2, "target_parameters is 1.2; allowed: above 0, up to 1"),
        ("head", 0.8, "target_of is 'head'; allowed: 'model', 'decoder'"),
        ("decoder", 0.1, "target_parameters is 0.1 of the decoder, but no pruning ratio comes within 0.003"),
    ],
)
def test_targets_out_of_reach_are_refused(part, target, message):
    model = make_small_model(8)
    with pytest.raises(ValueError, match=message):
        find_ratio(lambda r: ratios.allocate(torch.ones(4), r, 2, 0.0), model, target, part, [0] * 4, shift=True)
