"""heads.py against a literal version that sums the heads' contributions over tokens, again for every candidate."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from literal import contributions, literal_select, literal_similarity
from slimllm_nb import heads


def case(seed: int, tokens=50, count=6, head_dim=3, hidden=10, rank=6):
    """Head inputs of low rank plus noise: heads that say the same, as real ones do, so that exchanges pay."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, rank, generator=g) @ torch.randn(rank, count * head_dim, generator=g)
    rows += 0.1 * torch.randn(tokens, count * head_dim, generator=g) + torch.randn(count * head_dim, generator=g)
    return rows.view(tokens, count, head_dim), torch.randn(hidden, count * head_dim, generator=g)


@pytest.mark.parametrize("shape", [{}, {"hidden": 1}, {"count": 1}, {"hidden": 1, "count": 2, "head_dim": 1}], ids=str)
def test_covariance_is_numpys(shape):
    head_inputs, weight = case(0, **shape)
    p = contributions(head_inputs, weight)
    covariance = heads.head_covariance(head_inputs, weight)
    for j in range(p.shape[2]):
        np.testing.assert_allclose(
            covariance[j].numpy(), np.atleast_2d(np.cov(p[:, :, j], bias=True)), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("seed", range(8))
def test_similarity_importance_and_selection_equal_the_literal_version(seed):
    head_inputs, weight = case(seed)
    p = contributions(head_inputs, weight)
    covariance = heads.head_covariance(head_inputs, weight)
    for kept in itertools.chain(itertools.combinations(range(6), 2), itertools.combinations(range(6), 5)):
        assert heads.similarity(covariance, torch.tensor(kept)).item() == pytest.approx(literal_similarity(p, kept))
    importance = [-literal_similarity(p, [g for g in range(6) if g != h]) for h in range(6)]
    np.testing.assert_allclose(heads.head_importance(covariance).numpy(), importance, rtol=1e-10)
    for num_pruned in range(6):
        for greedy in (True, False):
            kept = heads.select_heads(covariance, num_pruned, greedy=greedy)
            assert kept.tolist() == literal_select(p, num_pruned, greedy)


def test_greedy_search_exchanges_heads_in_some_case():
    """Otherwise the comparison above would not have tried the search."""
    changed = 0
    for seed in range(8):
        covariance = heads.head_covariance(*case(seed))
        changed += not torch.equal(heads.select_heads(covariance, 3), heads.select_heads(covariance, 3, greedy=False))
    assert changed > 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), num_pruned=st.integers(0, 5))
def test_laws(seed, num_pruned):
    head_inputs, weight = case(seed)
    covariance = heads.head_covariance(head_inputs, weight)
    kept = heads.select_heads(covariance, num_pruned)
    assert len(kept) == 6 - num_pruned
    # The search never makes it worse; everything kept correlates perfectly with itself.
    plain = heads.select_heads(covariance, num_pruned, greedy=False)
    assert heads.similarity(covariance, kept) >= heads.similarity(covariance, plain)
    assert heads.similarity(covariance, torch.arange(6)).item() == pytest.approx(len(weight))
    # The order of the tokens, a constant added to the activations, and the scale of the output do not matter.
    other = heads.head_covariance(head_inputs.flip(0) + 5.0, weight * torch.linspace(-3, 4, len(weight))[:, None])
    assert heads.select_heads(other, num_pruned).tolist() == kept.tolist()


def test_an_output_that_does_not_vary_counts_as_zero():
    head_inputs, weight = case(1)
    weight = torch.cat([weight, torch.zeros(2, weight.shape[1])])
    covariance = heads.head_covariance(head_inputs, weight)
    assert heads.similarity(covariance, torch.arange(6)).item() == pytest.approx(10.0)
    silent = head_inputs.clone()
    silent[:, 2] = 7.0  # a constant head: removing it leaves the centred output as it is
    covariance = heads.head_covariance(silent, weight)
    assert heads.head_importance(covariance).argmin() == 2
    assert heads.similarity(covariance, torch.tensor([2])).item() == 0.0


@pytest.mark.parametrize("num_pruned", [-1, 6, 7])
def test_out_of_range(num_pruned):
    with pytest.raises(ValueError, match=rf"num_pruned is {num_pruned}; allowed: 0 to 5"):
        heads.select_heads(heads.head_covariance(*case(0)), num_pruned)
