"""channels.py against eqs. 5-8 written out loop by loop, with numpy's eigendecomposition in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from literal import literal_channels, literal_importance
from slimllm_nb import channels


def case(seed: int, tokens=60, hidden=7, intermediate=20):
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, hidden, generator=g) * torch.linspace(0.1, 4, hidden) + 1
    activations = torch.randn(tokens, intermediate, generator=g) * torch.rand(intermediate, generator=g) + 0.3
    gate, up = torch.randn(2, intermediate, hidden, generator=g)
    return inputs, activations, gate, up, torch.randn(hidden, intermediate, generator=g)


@pytest.mark.parametrize("seed", range(5))
def test_importance_equals_the_literal_version(seed):
    data = case(seed)
    exact = [one.double() for one in data]  # weights in float32 are projected in float32
    np.testing.assert_allclose(channels.channel_importance(*exact).numpy(), literal_importance(*data), rtol=1e-9)
    np.testing.assert_allclose(channels.channel_importance(*data).numpy(), literal_importance(*data), rtol=1e-6)
    np.testing.assert_allclose(literal_channels(*data), literal_importance(*data), rtol=1e-9)  # what make bench runs


def test_toy_answer():
    """Two outputs, the first varies four times as much as the second: by hand."""
    activations = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    down = torch.eye(2)
    zero = torch.zeros(2, 2)
    importance = channels.channel_importance(torch.ones(4, 2), activations, zero, zero, down)
    # Scatter = diag(8, 2), mean 5: sigmoid(1.6), sigmoid(0.4), times the norms sqrt(8) and sqrt(2).
    expected = [math.sqrt(8) / (1 + math.exp(-1.6)), math.sqrt(2) / (1 + math.exp(-0.4))]
    assert importance.tolist() == pytest.approx(expected)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_laws(seed):
    inputs, activations, gate, up, down = case(seed)
    importance = channels.channel_importance(inputs, activations, gate, up, down)
    order = torch.randperm(len(importance), generator=torch.Generator().manual_seed(seed))
    shuffled = channels.channel_importance(
        inputs.flip(0), activations[:, order].flip(0), gate[order], up[order], down[:, order]
    )
    torch.testing.assert_close(shuffled, importance[order])  # the order of tokens and channels does not matter
    # Turning the output space turns the feature space with it: importance stays.
    turn = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(seed)).double()).Q
    turned = channels.channel_importance(
        inputs.double(), activations.double(), gate.double(), up.double(), turn @ down.double()
    )
    torch.testing.assert_close(turned, importance, rtol=1e-6, atol=0)
    # The direction term lies between one half and one times the plain length of the row.
    outputs = activations.double() @ down.double().T
    scatter = (outputs - outputs.mean(0)).T @ (outputs - outputs.mean(0))
    ratio = channels.direction_importance(scatter, down) / down.double().norm(dim=0)
    assert (ratio >= 0.5 - 1e-12).all() and (ratio <= 1).all()


def test_an_output_that_never_varies():
    importance = channels.direction_importance(torch.zeros(3, 3, dtype=torch.float64), torch.eye(3))
    assert importance.tolist() == pytest.approx([0.5] * 3)  # sigmoid(0)


def test_select_keeps_the_lowest():
    importance = torch.tensor([5.0, 1.0, 9.0, 0.0, 7.0, 3.0, 8.0, 2.0, 6.0, 4.0])
    assert channels.select_channels(importance, 3, keep_lowest=0.0).tolist() == [0, 2, 4, 5, 6, 8, 9]
    # The lowest tenth (channel 3) stays, the next three (1, 7, 5) go.
    assert channels.select_channels(importance, 3, keep_lowest=0.1).tolist() == [0, 2, 3, 4, 6, 8, 9]
    # 0.4 * 10 lowest and 8 to remove are more than 10: only 2 of the lowest are kept.
    assert channels.select_channels(importance, 8, keep_lowest=0.4).tolist() == [1, 3]
    assert channels.select_channels(importance, 0).tolist() == list(range(10))


@pytest.mark.parametrize(
    "num_pruned, keep_lowest, message",
    [
        (-1, 0.01, "num_pruned is -1"),
        (10, 0.01, "num_pruned is 10"),
        (1, 1.0, "keep_lowest is 1.0"),
        (1, -0.1, "keep_low"),
    ],
)
def test_out_of_range(num_pruned, keep_lowest, message):
    with pytest.raises(ValueError, match=message):
        channels.select_channels(torch.arange(10.0), num_pruned, keep_lowest)
