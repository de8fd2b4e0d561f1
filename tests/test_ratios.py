"""ratios.py against eq. 11 written out, and its laws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimllm_nb import ratios

similarities = st.lists(st.floats(0.2, 1.0), min_size=2, max_size=40, unique=True)


def test_layer_similarity_token_by_token(generator):
    x, y = torch.randn(2, 9, 5, generator=generator)
    x[3] = 0.0  # no direction: counts as 0
    expected = []
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        lengths = math.hypot(*a) * math.hypot(*b)
        expected.append(sum(p * q for p, q in zip(a, b, strict=True)) / lengths if lengths else 0.0)
    assert ratios.layer_similarity(x, y).item() == pytest.approx(sum(expected) / 9)
    assert ratios.layer_similarity(x[:3], 7 * x[:3]).item() == pytest.approx(1.0)


@settings(max_examples=100, deadline=None)
@given(values=similarities, ratio=st.floats(0, 0.99), alpha=st.floats(0, 20), data=st.data())
def test_allocation_equals_equation_11(values, ratio, alpha, data):
    pruned_layers = data.draw(st.integers(0, len(values)))
    result = ratios.allocate(torch.tensor(values, dtype=torch.float64), ratio, pruned_layers, alpha).tolist()
    chosen = sorted(range(len(values)), key=lambda i: -values[i])[:pruned_layers]
    total = sum(math.exp(alpha * values[i]) for i in chosen)
    for i, got in enumerate(result):
        expected = ratio * pruned_layers * math.exp(alpha * values[i]) / total if i in chosen else 0.0
        assert got == pytest.approx(expected, rel=1e-9)
    if pruned_layers:
        assert sum(result) / pruned_layers == pytest.approx(ratio)


def test_toy_answer():
    similarity = torch.tensor([0.2, 0.9, 0.9, 0.5])
    assert ratios.allocate(similarity, 0.25, 2, 10.0).tolist() == pytest.approx([0, 0.25, 0.25, 0])
    assert ratios.allocate(similarity, 0.3, 3, 0.0).tolist() == pytest.approx([0, 0.3, 0.3, 0.3])  # alpha 0: uniform


@pytest.mark.parametrize(
    "ratio, layers, alpha, message",
    [
        (-0.1, 2, 1.0, "pruning_ratio is -0.1"),
        (1, 2, 1.0, "pruning_ratio is 1;"),
        (1.2, 2, 1.0, "pruning_ratio is 1.2"),
        (0.2, 5, 1.0, "pruned_layers is 5; allowed: 0 to 4"),
        (0.2, -1, 1.0, "pruned_layers is -1"),
        (0.2, 2, float("nan"), "alpha is nan"),
    ],
)
def test_out_of_range(ratio, layers, alpha, message):
    with pytest.raises(ValueError, match=message):
        ratios.allocate(torch.rand(4), ratio, layers, alpha)


def test_similarity_that_is_not_finite():
    with pytest.raises(ValueError, match="similarity is not finite"):
        ratios.allocate(torch.tensor([0.5, float("nan")]), 0.2, 1, 1.0)
