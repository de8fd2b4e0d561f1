# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [raw]
# # ASSIGNMENT CONFIG
# name: a4_recovery
# export_cell: false
# check_all_cell: true
# show_question_points: true
# tests:
#   ok_format: false

# %% [markdown]
# # Assignment 4 · Recovery: two numbers per output, or all weights
#
# | | |
# |---|---|
# | Points | 25 (21 graded by themselves, 4 by a reader) |
# | Time | 90 to 120 minutes |
# | Difficulty | medium to hard |
# | After | notebook `04_regression_recovery`, paper section 4.3 |
#
# **Goal.** Recover the outputs of a pruned projection without training: first as the paper does, with a scale and a shift for every output, then by fitting all weights that are left. The second can do more, and overfits a few thousand tokens; you will see where.
#
# Write your code where a cell says `...`; `grader.check("q1")` runs the tests that you can see. Run the notebook from top to bottom before you hand it in.

# %%
import pandas as pd
import torch

from slimllm_nb import calibration, sources

# %% [markdown]
# ## Question 1: derive (4 points, written, 20 minutes)
#
# Output $j$ of a projection was $y_t$ for token $t$ and is $x_t$ after pruning. Derive the $a$ and $b$ that minimise $\sum_t (a x_t + b - y_t)^2$. Then the same for all kept weights at once: inputs $z_t$ (centred over the tokens) are split into kept ones $K$ and removed ones $P$, the old weights of the output are $w = (w_K, w_P)$, and $v$ shall minimise
#
# $$\frac1n\sum_t \big(v^\top z_{t,K} - w^\top z_t\big)^2 + \tau\, \lVert v - w_K\rVert^2 .$$
#
# Write the result in terms of $G = \frac1n\sum_t z_t z_t^\top$. What does $\tau \to \infty$ give, and what $\tau \to 0$?

# %% [raw]
# # BEGIN QUESTION
# name: q1
# manual: true
# points: 4

# %% [raw]
# # BEGIN SOLUTION

# %% [markdown]
# *One point each.* (1) $a = \mathrm{cov}(x, y) / \mathrm{var}(x)$, $b = \bar y - a \bar x$, from setting both derivatives to zero. (2) With $d = v - w_K$ the error is $d^\top z_K - w_P^\top z_P$, so that the gradient is $2\,(G_{KK} d - G_{KP} w_P + \tau d)$. (3) $v = w_K + (G_{KK} + \tau I)^{-1} G_{KP}\, w_P$. (4) $\tau \to \infty$: the weights stay as they are. $\tau \to 0$: least squares, which needs $G_{KK}$ to be of full rank, that is more tokens than kept inputs.

# %% [raw]
# # END SOLUTION

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 2: a scale and a shift (5 points, 15 minutes)
#
# For every output on its own. An output whose kept part does not vary gets scale 1 (and the shift that makes its mean right). Compute in float64.

# %% [raw]
# # BEGIN QUESTION
# name: q2
# points: 5

# %% [raw]
# # BEGIN SOLUTION


# %%
def fit(kept_output, full_output):
    """(tokens, hidden) twice -> scale and shift, (hidden,) each.

    They make scale * kept_output + shift closest to full_output.
    """
    # BEGIN SOLUTION
    x, y = kept_output.double(), full_output.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    variance = (x - mean_x).square().mean(0)
    varies = variance > 0
    covariance = ((x - mean_x) * (y - mean_y)).mean(0)
    scale = torch.where(varies, covariance / torch.where(varies, variance, 1), 1)
    return scale, mean_y - scale * mean_x
    # END SOLUTION


# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 1
"""  # END TEST CONFIG


def test_a_line(fit):
    import torch

    x = torch.tensor([[0.0], [1.0], [4.0]])
    found = fit(x, 3 * x - 2)
    assert found is not None, "fit returned None: write its body"
    found = [round(float(one), 6) for one in found]
    assert found == [3.0, -2.0], f"y = 3 x - 2: expected scale 3 and shift -2, found {found}"


# %%
""" # BEGIN TEST CONFIG
points: 3
hidden: true
"""  # END TEST CONFIG


def test_against_numpy(fit):
    import numpy as np
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=generator) + torch.arange(5)
    y = x * torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0]) + torch.randn(40, 5, generator=generator) + 7
    scale, shift = fit(x, y)
    for j in range(5):
        expected = np.polyfit(x[:, j].double().numpy(), y[:, j].double().numpy(), 1)
        found = [float(scale[j]), float(shift[j])]
        assert np.allclose(found, expected, atol=1e-6), (
            f"output {j}: expected scale and shift {expected.round(4).tolist()}, found {found}"
        )


# %%
""" # BEGIN TEST CONFIG
points: 1
hidden: true
"""  # END TEST CONFIG


def test_what_does_not_vary(fit):
    import torch

    scale, shift = fit(torch.full((4, 1), 2.0), torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    found = [float(scale), float(shift)]
    assert found == [1.0, 0.5], f"x is always 2, y is 2.5 on average: expected scale 1 and shift 0.5, found {found}"


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 3: fold it in (4 points, 10 minutes)
#
# A model that is served has no extra step: scale and shift must go into the projection. `weight` is that of a `torch.nn.Linear`, (hidden, inputs), and the projection may have a bias already; the scale was fitted to outputs *without* it.

# %% [raw]
# # BEGIN QUESTION
# name: q3
# points: 4

# %% [raw]
# # BEGIN SOLUTION


# %%
def folded(weight, bias, scale, shift):
    """weight (hidden, kept), bias (hidden,) or None, scale and shift (hidden,) -> new weight and new bias."""
    # BEGIN SOLUTION
    return scale[:, None] * weight, shift if bias is None else shift + bias
    # END SOLUTION


# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 1
"""  # END TEST CONFIG


def test_no_bias(folded):
    import torch

    found = folded(
        torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), None, torch.tensor([2.0, 10.0]), torch.tensor([0.5, 0.0])
    )
    assert found is not None, "folded returned None: write its body"
    assert found[0].tolist() == [[2, 4, 6], [40, 50, 60]], (
        f"scales 2 and 10: expected rows times 2 and times 10, found {found[0].tolist()}"
    )
    assert found[1].tolist() == [0.5, 0.0], f"expected the shift as bias, [0.5, 0], found {found[1].tolist()}"


# %%
""" # BEGIN TEST CONFIG
points: 3
hidden: true
"""  # END TEST CONFIG


def test_with_a_bias(folded):
    import torch

    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(3, 3, generator=generator), torch.randn(3, generator=generator)
    scale, shift, x = (torch.randn(*shape, generator=generator) for shape in ((3,), (3,), (6, 3)))
    new_weight, new_bias = folded(weight, bias, scale, shift)
    off = (x @ new_weight.T + new_bias - (scale * (x @ weight.T) + shift + bias)).abs().max().item()
    assert off < 1e-5, (
        f"a projection with a bias: expected scale * (weight x) + shift + bias, found outputs that are off by {off:.3g}"
    )


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 4: ridge regression (7 points, 25 minutes)
#
# Now all kept weights of the projection, for all outputs at once, by your formula of question 1, and the bias that makes the mean right. With $\tau$ = `penalty` times the mean of the diagonal of $G_{KK}$. Compute in float64.

# %% [raw]
# # BEGIN QUESTION
# name: q4
# points: 7

# %% [raw]
# # BEGIN SOLUTION


# %%
def ridge(inputs, weight, kept, penalty):
    """inputs (tokens, width), weight (hidden, width), kept: list of columns.

    -> weight (hidden, kept) and bias (hidden,).
    """
    # BEGIN SOLUTION
    inputs, weight = inputs.double(), weight.double()
    gone = [column for column in range(weight.shape[1]) if column not in set(kept)]
    means = inputs.mean(0)
    g = (inputs - means).T @ (inputs - means) / len(inputs)
    of_kept = g[kept][:, kept]
    damped = of_kept + penalty * of_kept.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64)
    new = weight[:, kept] + torch.linalg.solve(damped, g[kept][:, gone] @ weight[:, gone].T).T
    return new, weight @ means - new @ means[kept]
    # END SOLUTION


# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 1
"""  # END TEST CONFIG


def test_a_copy(ridge):
    import torch

    z = torch.tensor([[1.0], [-1.0], [2.0], [-2.0]])
    found = ridge(torch.cat([z, z], 1), torch.tensor([[1.0, 1.0]]), [0], 1e-9)
    assert found is not None, "ridge returned None: write its body"
    assert abs(float(found[0]) - 2) < 1e-6, (
        f"two inputs that are the same, one goes: expected the other to take its weight, 2, found {float(found[0])}"
    )


# %%
""" # BEGIN TEST CONFIG
points: 2
hidden: true
"""  # END TEST CONFIG


def test_strong_penalty(ridge):
    import torch

    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(30, 6, generator=generator) + 1, torch.randn(3, 6, generator=generator)
    new, bias = ridge(x, weight, [0, 2, 5], 1e9)
    off = (new - weight[:, [0, 2, 5]].double()).abs().max().item()
    assert off < 1e-6, (
        f"a penalty of 1e9: expected the weights that are left as they were, found some that are off by {off:.3g}"
    )
    expected = (x @ weight.T - x[:, [0, 2, 5]] @ weight[:, [0, 2, 5]].T).double().mean(0)
    off = (bias - expected).abs().max().item()
    assert off < 1e-4, (
        f"a penalty of 1e9: expected the mean of what is gone as bias, found one that is off by {off:.3g}"
    )


# %%
""" # BEGIN TEST CONFIG
points: 4
hidden: true
"""  # END TEST CONFIG


def test_as_the_library(ridge):
    import torch
    from slimllm_nb.methods.ridge import fit_ridge

    generator = torch.Generator().manual_seed(3)
    x = (
        torch.randn(40, 3, generator=generator) @ torch.randn(3, 8, generator=generator)
        + torch.randn(40, 8, generator=generator)
        + 2
    ).double()
    weight, kept = torch.randn(4, 8, generator=generator).double(), [1, 2, 4, 7]
    for penalty in (0.01, 0.3):
        expected = fit_ridge(torch.cov(x.T, correction=0), x.mean(0), weight, torch.tensor(kept), penalty)
        new, bias = ridge(x, weight, kept, penalty)
        off = max((new - expected[0]).abs().max().item(), (bias - expected[1]).abs().max().item())
        assert off < 1e-6, (
            f"penalty {penalty}: expected the library's weights and bias, found some that are off by {off:.3g}"
        )


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 5: where it overfits (5 points, 20 minutes)
#
# The cell below takes the input of `down_proj` in one layer of a real model, for tokens to fit on and for tokens of other documents. Half of the channels go (the less active ones). Fill `errors`: for every penalty, the relative error $\lVert \text{new output} - \text{full output} \rVert / \lVert \text{full output} \rVert$ on both, after a fit on the first `few` rows of `fitted`. Then name the penalty that you would take.

# %%
model, tokenizer = sources.load_model(), sources.load_tokenizer()
ids = calibration.draw_samples(sources.load_texts("news", "calibration"), tokenizer, num_samples=24, length=64)
with torch.no_grad():
    hidden = calibration.embed(model, ids)
    context = calibration.layer_context(model, hidden)
    for layer in model.model.layers[:10]:
        hidden = layer(hidden, **context)
    layer = model.model.layers[10]
    hidden = hidden + layer.self_attn(layer.input_layernorm(hidden), **context)[0]
    activations = calibration.mlp_activations(layer, calibration.mlp_inputs(layer, hidden))  # (tokens, channels)
weight = layer.mlp.down_proj.weight.detach()
fitted, held_out = activations[:1024], activations[1024:]
kept = fitted.norm(dim=0).argsort(descending=True)[: fitted.shape[1] // 2].sort().values.tolist()
penalties, few = [1e-6, 1e-3, 1e-2, 1e-1, 1.0, 10.0], 1024

# %% [raw]
# # BEGIN QUESTION
# name: q5
# points: 5

# %% [raw]
# # BEGIN SOLUTION


# %%
def relative_error(rows, new_weight, bias):
    """Of the kept columns of `rows` through the new weight, against all of them through the old one."""
    # BEGIN SOLUTION
    full = rows.double() @ weight.double().T
    new = rows[:, kept].double() @ new_weight.T + bias
    return ((new - full).norm() / full.norm()).item()
    # END SOLUTION


# %%
errors = {}  # penalty -> {"fitted": ..., "held out": ...}
# BEGIN SOLUTION
for penalty in penalties:
    new_weight, bias = ridge(fitted[:few], weight, kept, penalty)
    errors[penalty] = {
        "fitted": relative_error(fitted[:few], new_weight, bias),
        "held out": relative_error(held_out, new_weight, bias),
    }
# END SOLUTION
best_penalty = min(errors, key=lambda penalty: errors[penalty]["held out"])  # SOLUTION

# %%
pd.DataFrame(errors).T.rename_axis("penalty")

# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 1
"""  # END TEST CONFIG


def test_all_penalties(errors, penalties):
    assert errors, "errors is empty: fill it"
    assert list(errors) == list(penalties), f"errors: expected the penalties {penalties}, found {list(errors)}"
    assert all(set(one) == {"fitted", "held out"} for one in errors.values()), (
        f"errors of a penalty: expected 'fitted' and 'held out', found {list(errors[penalties[0]])}"
    )


# %%
""" # BEGIN TEST CONFIG
points: 2
hidden: true
"""  # END TEST CONFIG


def test_values(errors, fitted, held_out, weight, kept, few):
    import torch
    from slimllm_nb.methods.ridge import fit_ridge

    rows = fitted[:few].double()
    for penalty in (1e-2, 1.0):
        new, bias = fit_ridge(
            torch.cov(rows.T, correction=0), rows.mean(0), weight.double(), torch.tensor(kept), penalty
        )
        for name, of in (("fitted", rows), ("held out", held_out.double())):
            full = of @ weight.double().T
            expected = ((of[:, kept] @ new.T + bias - full).norm() / full.norm()).item()
            found = errors[penalty][name]
            assert abs(found / expected - 1) < 1e-3, (
                f"penalty {penalty}, {name}: expected {expected:.4f}, found {found:.4f}"
            )


# %%
""" # BEGIN TEST CONFIG
points: 2
hidden: true
"""  # END TEST CONFIG


def test_choice(errors, best_penalty):
    expected = min(errors, key=lambda penalty: errors[penalty]["held out"])
    assert best_penalty == expected, (
        f"best_penalty: expected {expected}, which has the smallest error on what was not fitted, found {best_penalty}"
    )


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION
