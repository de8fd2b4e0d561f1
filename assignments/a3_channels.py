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
# name: a3_channels
# export_cell: false
# check_all_cell: true
# show_question_points: true
# tests:
#   ok_format: false

# %% [markdown]
# # Assignment 3 · Channels in feature space, and a sensitivity scan
#
# | | |
# |---|---|
# | Points | 26 (22 graded by themselves, 4 by a reader) |
# | Time | 90 to 120 minutes |
# | Difficulty | medium |
# | After | notebook `03_channel_importance`, paper section 4.2 |
#
# **Goal.** Score the intermediate channels of an MLP as the paper does: by how active they are, and by whether their row of $W_\mathrm{down}$ points where the output varies. Then find out which layers can bear to lose channels at all.
#
# Write your code where a cell says `...`; `grader.check("q1")` runs the tests that you can see. Run the notebook from top to bottom before you hand it in.

# %%
import torch

from slimllm_nb import calibration, evaluation, pruning, sources

# %% [markdown]
# ## Question 1: how large the feature space really is (5 points, 20 minutes)
#
# Centre the MLP's outputs $Y$ (tokens, hidden) over the tokens. The eigenvectors of $Y^\top Y$ are directions, the eigenvalues say how much the output varies along each of them. How many directions, and which, does it take to hold a given share of all the variance? Return the *smallest* set, the direction with the largest variance first. Compute in float64, with the eigendecomposition for symmetric matrices.

# %% [raw]
# # BEGIN QUESTION
# name: q1
# points: 5

# %% [raw]
# # BEGIN SOLUTION


# %%
def leading_directions(outputs, share):
    """outputs (tokens, hidden), 0 < share <= 1 -> (hidden, count): the fewest columns that hold this share."""
    # BEGIN SOLUTION
    centred = outputs.double() - outputs.double().mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    held = variances.flip(0).cumsum(0) / variances.sum()
    count = int((held < share - 1e-12).sum()) + 1
    return directions.flip(1)[:, :count]
    # END SOLUTION


# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 1
"""  # END TEST CONFIG


def test_two_outputs(leading_directions):
    import torch

    outputs = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [0.0, -3.0]])
    found = leading_directions(outputs, 0.9)
    assert found is not None, "leading_directions returned None: write its body"
    counts = [leading_directions(outputs, share).shape[1] for share in (0.5, 0.9, 0.91)]
    assert counts == [1, 1, 2], f"variances 2 and 18, shares 0.5, 0.9 and 0.91: expected 1, 1, 2, found {counts}"


# %%
""" # BEGIN TEST CONFIG
points: 2
hidden: true
"""  # END TEST CONFIG


def test_centred(leading_directions):
    import torch

    rows = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).double()
    expected, found = (leading_directions(one, 0.8).shape[1] for one in (rows, rows + 100))
    assert found == expected > 1, (
        f"the same outputs, all of them 100 higher: expected the same number of directions, {expected}, found {found}"
    )


# %%
""" # BEGIN TEST CONFIG
points: 2
hidden: true
"""  # END TEST CONFIG


def test_directions(leading_directions):
    import torch

    rows = torch.randn(50, 5, generator=torch.Generator().manual_seed(1)).double() * torch.arange(1, 6)
    rows = rows - rows.mean(0) + 7
    found = leading_directions(rows, 0.9)
    centred = rows - rows.mean(0)
    held = (centred @ found).square().sum(0)
    expected = torch.linalg.svdvals(centred).square()
    off = (held / expected[: len(held)] - 1).abs().max().item()
    assert off < 1e-8, f"what the outputs vary along each direction: expected the largest variances, off by {off:.3g}"
    assert held.sum() >= 0.9 * expected.sum() > held[:-1].sum(), "expected the fewest directions that hold 90 %"


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 2: the direction of a channel (6 points, 25 minutes)
#
# Channel $i$ adds a multiple of row $w_i$ of $W_\mathrm{down}$ to the output (in PyTorch: column $i$ of `down_proj.weight`). Its length in the feature space, with each direction $q_m$ of variance $\lambda_m$ weighted by $\sigma(\lambda_m / \bar\lambda)$, $\bar\lambda$ the mean variance, is
#
# $$I_i^d = \sqrt{\sum_m \big(\sigma(\lambda_m / \bar\lambda)\; w_i^\top q_m\big)^2} .$$

# %% [raw]
# # BEGIN QUESTION
# name: q2
# points: 6

# %% [raw]
# # BEGIN SOLUTION


# %%
def direction_importance(variances, directions, down_weight):
    """variances (hidden,), directions (hidden, hidden), down_weight (hidden, channels) -> (channels,), float64."""
    # BEGIN SOLUTION
    along = directions.double().T @ down_weight.double()
    return (torch.sigmoid(variances / variances.mean())[:, None] * along).norm(dim=0)
    # END SOLUTION


# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 1
"""  # END TEST CONFIG


def test_along_the_axes(direction_importance):
    import torch

    found = direction_importance(
        torch.tensor([0.0, 2.0]).double(), torch.eye(2).double(), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    )
    assert found is not None, "direction_importance returned None: write its body"
    found = [round(one, 4) for one in found.tolist()]
    assert found == [0.5, 0.8808], (
        f"variances 0 and 2, a channel along each: expected sigmoid(0) = 0.5 and sigmoid(2) = 0.8808, found {found}"
    )


# %%
""" # BEGIN TEST CONFIG
points: 3
hidden: true
"""  # END TEST CONFIG


def test_as_the_library(direction_importance):
    import torch
    from slimllm_nb import channels

    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(60, 6, generator=generator).double() * torch.tensor([0.1, 0.5, 1, 1, 3, 5])
    down = torch.randn(6, 20, generator=generator)
    centred = rows - rows.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    expected = channels.direction_importance(centred.T @ centred, down)
    off = (direction_importance(variances, directions, down) / expected - 1).abs().max().item()
    assert off < 1e-6, f"20 channels, 6 outputs: expected the library's lengths, found some that are off by {off:.1%}"


# %%
""" # BEGIN TEST CONFIG
points: 2
hidden: true
"""  # END TEST CONFIG


def test_scale_of_the_outputs(direction_importance):
    import torch

    generator = torch.Generator().manual_seed(3)
    variances = torch.rand(5, generator=generator).double().sort().values
    directions = torch.linalg.qr(torch.randn(5, 5, generator=generator).double()).Q
    down = torch.randn(5, 8, generator=generator)
    found = direction_importance(variances, directions, down) / direction_importance(1000 * variances, directions, down)
    off = (found - 1).abs().max().item()
    assert off < 1e-8, (
        f"outputs that vary 1000 times as much in every direction: expected the same lengths, found a change of {off:.1%}"
    )


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 3: the score of a channel (4 points, 15 minutes)
#
# Eq. 8: the norm of the channel's activation over the tokens times $I_i^d$, plus the norms of its rows of $W_\mathrm{gate}$ and $W_\mathrm{up}$, each entry weighted by the norm over the tokens of the input that it multiplies.

# %% [raw]
# # BEGIN QUESTION
# name: q3
# points: 4

# %% [raw]
# # BEGIN SOLUTION


# %%
def channel_scores(inputs, activations, gate_weight, up_weight, lengths):
    """inputs (tokens, hidden), activations (tokens, channels), weights (channels, hidden), lengths (channels,)."""
    # BEGIN SOLUTION
    input_norms = inputs.double().norm(dim=0)
    first = activations.double().norm(dim=0) * lengths
    return first + (gate_weight * input_norms).norm(dim=1) + (up_weight * input_norms).norm(dim=1)
    # END SOLUTION


# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 1
"""  # END TEST CONFIG


def test_by_hand(channel_scores):
    import torch

    found = channel_scores(
        torch.tensor([[3.0], [4.0]]),
        torch.tensor([[1.0], [0.0]]),
        torch.tensor([[2.0]]),
        torch.tensor([[-1.0]]),
        torch.tensor([0.5]),
    )
    assert found is not None, "channel_scores returned None: write its body"
    assert round(float(found[0]), 6) == 15.5, (
        f"input norm 5, activation norm 1, gate 2, up -1, length 0.5: expected 0.5 + 10 + 5 = 15.5, found {float(found[0])}"
    )


# %%
""" # BEGIN TEST CONFIG
points: 3
hidden: true
"""  # END TEST CONFIG


def test_as_the_library(channel_scores):
    import torch
    from slimllm_nb import channels

    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(30, 6, generator=generator) * torch.tensor([0.1, 0.5, 1, 1, 3, 9])
    activations = torch.randn(30, 20, generator=generator)
    gate, up = torch.randn(2, 20, 6, generator=generator)
    down = torch.randn(6, 20, generator=generator)
    outputs = activations.double() @ down.double().T
    centred = outputs - outputs.mean(0)
    lengths = channels.direction_importance(centred.T @ centred, down)
    expected = channels.channel_importance(inputs, activations, gate, up, down)
    off = (channel_scores(inputs, activations, gate, up, lengths) / expected - 1).abs().max().item()
    assert off < 1e-5, f"20 channels: expected the library's scores, found some that are off by {off:.1%}"


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 4: which channels stay (3 points, 10 minutes)
#
# The lowest `num_pruned` go, but the authors' code keeps the very lowest: a share `keep_lowest` of all channels, rounded, stays at the bottom, and the ones above them go.

# %% [raw]
# # BEGIN QUESTION
# name: q4
# points: 3

# %% [raw]
# # BEGIN SOLUTION


# %%
def kept_channels(scores, num_pruned, keep_lowest):
    """scores (channels,) -> sorted list of the channels that stay."""
    # BEGIN SOLUTION
    order, lowest = torch.argsort(scores, stable=True).tolist(), round(keep_lowest * len(scores))
    return sorted(order[:lowest] + order[lowest + num_pruned :])
    # END SOLUTION


# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 1
"""  # END TEST CONFIG


def test_none_at_the_bottom(kept_channels):
    import torch

    found = kept_channels(torch.tensor([5.0, 1.0, 3.0, 2.0, 4.0]), 2, 0.0)
    assert found is not None, "kept_channels returned None: write its body"
    assert [int(one) for one in found] == [0, 2, 4], f"scores 5, 1, 3, 2, 4, two go: expected [0, 2, 4], found {found}"


# %%
""" # BEGIN TEST CONFIG
points: 2
hidden: true
"""  # END TEST CONFIG


def test_some_at_the_bottom(kept_channels):
    import torch

    found = [int(one) for one in kept_channels(torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0]), 3, 0.2)]
    assert found == [0, 1, 2, 3, 4, 8, 9], (
        f"scores 9 to 0, three go, 20 % stay at the bottom: expected [0, 1, 2, 3, 4, 8, 9], found {found}"
    )


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 5: the sensitivity scan (4 points, 20 minutes)
#
# Which layers can lose channels? Prune one layer at a time and look at the perplexity. An *allocation* is the part of a method that says how much goes where: a function whose parameters name what it needs, here the number of layers, and that returns a ratio for every layer.
#
# Write `only(layer, ratio)`: it returns such a function, which asks for `ratio` of that layer and for nothing of all others. The cell below uses it for four layers.

# %% [raw]
# # BEGIN QUESTION
# name: q5
# points: 4

# %% [raw]
# # BEGIN SOLUTION


# %%
def only(layer, ratio):
    """An allocation: function of num_layers -> (layers,) ratios, float64."""

    # BEGIN SOLUTION
    def allocation(num_layers):
        ratios = torch.zeros(num_layers, dtype=torch.float64)
        ratios[layer] = ratio
        return ratios

    return allocation
    # END SOLUTION


# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 1
"""  # END TEST CONFIG


def test_is_an_allocation(only):
    found = only(1, 0.5)
    assert found is not None, "only returned None: write its body"
    assert callable(found), f"only(1, 0.5): expected a function, found {type(found).__name__}"
    found = [float(one) for one in found(num_layers=3)]
    assert found == [0.0, 0.5, 0.0], f"only(1, 0.5) with 3 layers: expected [0, 0.5, 0], found {found}"


# %%
""" # BEGIN TEST CONFIG
points: 3
hidden: true
"""  # END TEST CONFIG


def test_prunes_that_layer(only, model, input_ids):
    from slimllm_nb import pruning

    last = model.config.num_hidden_layers - 1
    method = {"allocation": only(last, 0.5)}
    _, report = pruning.prune(
        model, input_ids[:2], pruning_ratio=0.5, pruned_layers=1, alpha=0.0, method=method, progress=False
    )
    touched = [line.index for line in report.layers if len(line.kept_channels) < line.channels]
    assert touched == [last], f"only({last}, 0.5): expected that layer alone to lose channels, found {touched}"


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %%
model, tokenizer = sources.load_model(), sources.load_tokenizer()
texts, held_out = sources.load_texts("news", "calibration"), sources.load_texts("news", "held-out")
input_ids = calibration.draw_samples(texts, tokenizer, num_samples=8, length=64)
blocks = evaluation.token_blocks(held_out, tokenizer, block_length=64, max_tokens=512)

# %%
amount = {"pruning_ratio": 0.5, "pruned_layers": 1, "alpha": 0.0, "progress": False}
last = model.config.num_hidden_layers - 1
print(f"dense: {evaluation.perplexity(model, blocks, progress=False):.1f}")
for shown in (0, last // 3, 2 * last // 3, last):
    pruned, _ = pruning.prune(model, input_ids, **amount, method={"allocation": only(shown, 0.5)})
    print(f"half of layer {shown}: {evaluation.perplexity(pruned, blocks, progress=False):.1f}")

# %% [markdown]
# ## Question 6: what the scan says (4 points, written, 20 minutes)
#
# In four to eight sentences: which layers of the scan bear the loss of half of their heads and channels, and which do not? The paper spares the first and the last layers and asks the others for ratios by their cosine similarity (notebook 05): does your scan agree with that? A scan takes a pruning and an evaluation for every layer: what would it cost for LLaMA-7B, and what does it not see?

# %% [raw]
# # BEGIN QUESTION
# name: q6
# manual: true
# points: 4

# %% [raw]
# # BEGIN SOLUTION

# %% [markdown]
# *One point each.* (1) Read off the printed perplexities, relative to the dense one. (2) Compared with the rule, with the numbers, not with what was hoped for. (3) Cost: 32 prunings of one layer and 32 evaluations of the whole test set, against one forward pass for the similarities. (4) Not seen: that errors of several layers add up or make up for each other; it looks at one layer with all others whole, on one corpus and one draw of samples.

# %% [raw]
# # END SOLUTION

# %% [raw]
# # END QUESTION
