"""feature_space.py against the eigendecomposition: lengths within their bounds, and the same choice of channels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimllm_nb import channels, feature_space, symmetric
from slimllm_nb.calibration import draw_samples
from slimllm_nb.methods import Approximate, PartError, published, register
from slimllm_nb.methods.registry import find_part, make_part
from slimllm_nb.pruning import prune
from slimllm_nb.sources import load_model, load_texts, load_tokenizer

WIDTH, CHANNELS = 120, 300


def scatter_with(variances: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(len(variances), len(variances), generator=generator).double()).Q
    return (directions * variances) @ directions.T


def spectrum(name: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    bulk = torch.rand(WIDTH, generator=generator).double() * 3
    if name == "outliers":  # as the outputs of a LLaMA: a few directions hold most of the variance
        bulk[:5] = torch.tensor([4000.0, 900.0, 300.0, 299.0, 120.0])
        bulk[5:] *= 10
    if name == "constant":
        bulk[:] = 1.0
    if name == "one direction":
        bulk[1:] = 0.0
    if name == "nothing":
        bulk[:] = 0.0
    if name == "wide":  # no gap, and far too wide for a polynomial
        bulk = torch.linspace(0, 1, WIDTH).double() ** 12 * 1e4
    return bulk * 7


def weights(seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(CHANNELS, generator=generator) + 0.5
    return torch.randn(WIDTH, CHANNELS, generator=generator) * scale


NAMES = ["bulk", "outliers", "constant", "one direction", "nothing", "wide"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_every_length_is_within_its_bound_and_exact_where_asked(name, seed):
    scatter, down = scatter_with(spectrum(name, seed), seed), weights(seed)
    expected = channels.direction_importance(scatter, down)
    lengths = feature_space.approximate_lengths(scatter, down)
    assert ((lengths.values - expected).abs() <= lengths.bounds + 1e-9 * expected).all()
    some = torch.arange(0, CHANNELS, 7)
    torch.testing.assert_close(lengths.exactly(some), expected[some], rtol=1e-9, atol=0)


def test_a_spectrum_with_outliers_is_approximated_and_not_decomposed(monkeypatch):
    scatter, down = scatter_with(spectrum("outliers")), weights()
    expected = channels.direction_importance(scatter, down)
    monkeypatch.setattr(channels, "direction_importance", None)
    lengths = feature_space.approximate_lengths(scatter, down)
    plain = down.norm(dim=0)
    assert 0 < (lengths.bounds / plain).max() < 0.02
    torch.testing.assert_close(lengths.exactly(torch.arange(9)), expected[:9], rtol=1e-9, atol=0)


@pytest.mark.parametrize("largest", [1.0, 4.0, 9.0, 30.0])
@pytest.mark.parametrize("degree", feature_space.DEGREES)
def test_the_tail_bounds_the_polynomial_everywhere(largest, degree):
    x = np.linspace(0, largest, 4001)
    series = feature_space._series(largest)[: degree + 1]
    error = np.abs(np.polynomial.chebyshev.chebval(2 * x / largest - 1, series) - 1 / (1 + np.exp(-x)) ** 2)
    assert error.max() <= feature_space._tail(largest, degree) <= 6 * error.max() + 1e-13


@pytest.mark.parametrize("degree", feature_space.DEGREES)
def test_the_matrix_polynomial_is_that_polynomial(degree):
    variances = spectrum("bulk") / spectrum("bulk").mean()
    found = feature_space._Spectrum.of(scatter_with(variances))
    series = feature_space._series(found.largest)[: degree + 1]
    values = torch.from_numpy(np.polynomial.chebyshev.chebval(2 * variances.numpy() / found.largest - 1, series))
    torch.testing.assert_close(found.polynomial(degree).double(), scatter_with(values), rtol=0, atol=1e-5)


def test_the_spectrum_is_proven_to_lie_below_the_bound():
    matrix = scatter_with(torch.linspace(0, 5, WIDTH).double())
    assert feature_space._is_below(matrix, 5.1)
    assert not feature_space._is_below(matrix, 4.9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), num_pruned=st.integers(1, CHANNELS - 1), name=st.sampled_from(NAMES))
def test_the_same_channels_go(seed, num_pruned, name):
    """Laws of settled(): with scores that are off by up to their bounds, the choice is the true scores' choice."""
    scatter, down = scatter_with(spectrum(name, seed), seed), weights(seed)
    expected = channels.direction_importance(scatter, down)
    lengths = feature_space.approximate_lengths(scatter, down)
    for selection in ("keep_lowest", "lowest"):
        part = find_part("channel_selection", selection)
        known = {"num_pruned": num_pruned}
        chosen = part(known | {"scores": lengths.settled(part, num_pruned)})
        assert chosen.tolist() == part(known | {"scores": expected}).tolist()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), num_pruned=st.integers(1, 19), width=st.floats(0, 3))
def test_scores_anywhere_within_their_bounds(seed, num_pruned, width):
    generator = torch.Generator().manual_seed(seed)
    true = torch.randint(0, 8, (20,), generator=generator).double() + 1e-3 * torch.arange(20)
    bounds = torch.rand(20, generator=generator).double() * width
    values = true + bounds * (2 * torch.rand(20, generator=generator).double() - 1)
    asked = []

    def exactly(some):
        asked.append(len(some))
        return true[some]

    part = find_part("channel_selection", {"name": "keep_lowest", "keep_lowest": 0.1})
    settled = Approximate(values, bounds, exactly).settled(part, num_pruned)
    known = {"num_pruned": num_pruned}
    assert part(known | {"scores": settled}).tolist() == part(known | {"scores": true}).tolist()
    if width == 0:
        assert sum(asked) <= 4  # the two at either side of each of the two cuts


def test_few_channels_are_left_open():
    scatter, down = scatter_with(spectrum("bulk")), weights()
    lengths = feature_space.approximate_lengths(scatter, down)
    found = lengths.undecided(torch.tensor([75]))
    assert 2 <= found.sum() <= 12


def test_a_selection_by_rank_asks_for_nothing_else():
    with pytest.raises(PartError, match="by_rank and asks for scores, input_norms; allowed: scores and num_pruned"):
        make_part("channel_selection", "mine", lambda scores, input_norms: scores, by_rank=True)
    assert register.channel_selection("lowest", by_rank=True)


@pytest.mark.parametrize("width", [1, 5, 8, 13])
def test_half_computed_products(width, monkeypatch):
    monkeypatch.setattr(symmetric, "BLOCK", 4)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(30, width, generator=generator).double()
    total = torch.zeros(width, width, dtype=torch.float64)
    for some in rows.split(7):
        symmetric.add_gram(total, some)
    gram = rows.T @ rows
    torch.testing.assert_close(symmetric.mirrored(total), gram)
    cube = gram @ gram @ gram
    torch.testing.assert_close(symmetric.product(gram, gram @ gram), cube)
    vectors = torch.randn(width, 6, generator=generator).double()
    torch.testing.assert_close(symmetric.quadratic_forms(gram, vectors), ((gram @ vectors) * vectors).sum(0))


@pytest.mark.slow
@torch.no_grad()
def test_the_same_channels_of_every_layer_of_the_embedded_model(monkeypatch):
    """With approximate lengths as a wide layer has them, against eigendecompositions in float64."""
    model, tokenizer = load_model("embedded"), load_tokenizer("embedded")
    input_ids = draw_samples(load_texts("news", "calibration"), tokenizer, num_samples=8, length=64)
    amount = {"pruning_ratio": 0.3, "pruned_layers": model.config.num_hidden_layers, "alpha": 1.0, "progress": False}
    _, expected = prune(model, input_ids, **amount)
    asked = []
    approximate = feature_space.approximate_lengths
    monkeypatch.setattr(published, "approximate_lengths", lambda *args: asked.append(approximate(*args)) or asked[-1])
    monkeypatch.setattr(channels, "WIDE", 1)
    _, found = prune(model, input_ids, **amount)
    for index, (one, other) in enumerate(zip(found.layers, expected.layers, strict=True)):
        assert one.kept_channels == other.kept_channels, index
    assert sum((one.bounds > 0).any().item() for one in asked) > len(asked) / 2  # not all fell back on the exact way
