"""data/ablations/variants.py, against what the formulas say."""

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

import literal_methods as literal
from slimllm_nb.comparison.plan import load_plan
from slimllm_nb.methods import as_method
from test_methods import case


@pytest.fixture(scope="module")
def parts():
    methods = load_plan()["variants"].named_methods()
    return {part.name: part.function for method in methods.values() for part in as_method(method).parts}


@pytest.mark.parametrize("seed", range(3))
def test_the_first_order_term(parts, seed):
    """Every fit anew, from all heads: what it costs more, and what the head has in common with the output."""
    x, weight = (one.double() for one in case(seed))
    covariance, (x, w) = torch.cov(x.T, correction=0), (x.numpy(), weight.numpy())
    h, gone = literal.damped(x), []
    for number in range(1, 4):
        costs = {}
        for head in [one for one in range(4) if one not in gone]:
            before, after = ({g * 3 + k for g in some for k in range(3)} for some in (gone, [*gone, head]))
            kept = [column for column in range(12) if column not in before]
            fitted = np.zeros_like(w)
            fitted[:, kept] = np.linalg.solve(h[np.ix_(kept, kept)], h[kept] @ w.T).T
            own = list(range(head * 3, head * 3 + 3))
            second = literal.cost_without(h, w, after) - (literal.cost_without(h, w, before) if before else 0.0)
            costs[head] = second + np.trace(fitted[:, own] @ (fitted @ h)[:, own].T)
        gone.append(min(costs, key=costs.get))
        kept = parts["obs_first_order"](covariance, weight, 3, number)
        assert kept.tolist() == [head for head in range(4) if head not in gone]


def test_ridge_leverage(parts):
    """The share of a column that a ridge regression on all columns gives back, from its own unit vector."""
    x, _ = case(0)
    covariance = torch.cov(x.double().T, correction=0)
    values, vectors = np.linalg.eigh(covariance.numpy())
    shrink = 0.01 * np.trace(covariance.numpy()) / len(values)
    expected = [(vectors[i] ** 2 * values / (values + shrink)).sum() for i in range(len(values))]
    np.testing.assert_allclose(parts["ridge_leverage"](covariance).numpy(), expected, rtol=1e-9)


def test_rotation_is_the_best_of_all_turns(parts):
    x, weight = (one.double() for one in case(0))
    kept, x = torch.tensor([0, 1, 2, 5, 7, 8, 11]), x + 3.0
    new, bias = parts["rotation"](torch.cov(x.T, correction=0), x.mean(0), weight, kept)
    outputs, partial = x @ weight.T, x[:, kept] @ weight[:, kept].T
    turn, _ = orthogonal_procrustes((partial - partial.mean(0)).numpy(), (outputs - outputs.mean(0)).numpy())
    np.testing.assert_allclose(new.numpy(), turn.T @ weight[:, kept].numpy(), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose((x[:, kept] @ new.T + bias).mean(0).numpy(), outputs.mean(0).numpy(), rtol=1e-9)
