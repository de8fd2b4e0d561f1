"""data/ablations/targets.py on a small model, against the library's ridge regression and numpy's least squares."""

import numpy as np
import pytest
import torch

from conftest import make_small_model
from slimllm_nb.pruning import prune
from workplace import program

AMOUNT = {"pruning_ratio": 0.4, "pruned_layers": 3, "alpha": 2.0, "progress": False}
IDS = torch.randint(0, 101, (16, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def targets():
    return program("data/ablations/targets.py")


def pruned(model, refit=None):
    recovery = "ridge" if refit is None else refit.__call__
    return prune(model, IDS, **AMOUNT, method={"base": "obs_heads_ridge", "recovery": recovery})


@torch.no_grad()
def test_towards_the_prefix_it_is_the_librarys_ridge(targets):
    model = make_small_model(4).double()
    refit = targets.Refit(model, IDS, (0.0, 0.0))
    (expected, report), (found, other) = pruned(model), pruned(model, refit)
    assert [one.mlp_notes for one in report.layers] == [one.mlp_notes for one in other.layers]
    for name, one in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], one, rtol=1e-6, atol=1e-9)
    # Beside prune() it has walked the same hidden states.
    states = found.model(IDS, output_hidden_states=True).hidden_states
    while refit.at < 2 * len(model.model.layers):
        refit.own, refit.at = refit.own + refit.output(refit.own), refit.at + 1
    torch.testing.assert_close(found.model.norm(refit.own), states[-1], rtol=1e-6, atol=1e-9)


@torch.no_grad()
def test_towards_the_dense_model_hidden_states_are_nearer(targets):
    model = make_small_model(4).double()
    dense = model.model(IDS).last_hidden_state
    far = [
        (pruned(model, targets.Refit(model, IDS, shares))[0].model(IDS).last_hidden_state - dense).norm().item()
        for shares in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0))
    ]
    assert far == sorted(far, reverse=True)


def test_weighted_ridge_is_least_squares_with_rows_for_the_penalty(targets):
    rng = np.random.default_rng(0)
    x, y, old, weights = rng.normal(size=(40, 5)) + 2, rng.normal(size=(40, 3)), rng.normal(size=(3, 5)), rng.random(40)
    share = weights / weights.sum()
    variances = share @ (x - share @ x) ** 2
    rows = np.sqrt(share)[:, None] * np.c_[x, np.ones(40)]
    ridge = np.sqrt(0.3 * variances.mean()) * np.c_[np.eye(5), np.zeros(5)]
    solved = np.linalg.lstsq(np.r_[rows, ridge], np.r_[np.sqrt(share)[:, None] * y, ridge[:, :5] @ old.T], rcond=None)[
        0
    ]
    new, bias = targets.weighted_ridge(*map(torch.tensor, (x, y, old, weights)), [0.3])[0]
    np.testing.assert_allclose(new.numpy(), solved[:5].T, rtol=1e-9)
    np.testing.assert_allclose(bias.numpy(), solved[5], rtol=1e-9)


def test_token_weights_are_squared_gradients(targets):
    """By a step of every output of one token in both directions."""
    model = make_small_model(4, num_hidden_layers=2).double().requires_grad_(False)
    found = targets.token_weights(model, IDS[:2])
    squares, projection = torch.zeros(20, dtype=torch.float64), model.model.layers[0].mlp.down_proj
    for token in (3, 14):
        for output in range(model.config.hidden_size):
            losses = []
            for step in (1e-3, -1e-3):

                def moved(module, inputs, result, token=token, output=output, step=step):
                    result = result.clone()
                    result.view(20, -1)[token, output] += step
                    return result

                handle = projection.register_forward_hook(moved)
                logits = model(IDS[:2]).logits[:, :-1]  # its own loss, like its norms, is float32
                losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:2, 1:].flatten()).item())
                handle.remove()
            squares[token] += ((losses[0] - losses[1]) / 2e-3) ** 2
    assert (squares[3] / squares[14]).item() == pytest.approx((found[1][3] / found[1][14]).item(), rel=2e-3)
    assert max(one.max() for one in found.values()) <= targets.CLIP
