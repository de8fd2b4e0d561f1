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
# name: a1_perplexity_and_calibration
# export_cell: false
# check_all_cell: true
# show_question_points: true
# tests:
#   ok_format: false

# %% [markdown]
# # Assignment 1 · Perplexity and calibration
#
# | | |
# |---|---|
# | Points | 20 (16 graded by themselves, 4 by a reader) |
# | Time | 60 to 90 minutes |
# | Difficulty | easy to medium |
# | After | notebook `01_calibration` and `06_evaluation`, section 2 |
#
# **Goal.** Everything in this course is judged by one number and decided by one kind of statistic. You write both: perplexity, and a covariance that is gathered batch by batch.
#
# Write your code where a cell says `...`. `grader.check("q1")` runs the tests of a question that you can see; there are others that you cannot, which look at the cases that your code should have thought of. Run the notebook from top to bottom before you hand it in: *Kernel, Restart Kernel and Run All Cells*.

# %%
import math

import torch

from slimllm_nb import sources

# %% [markdown]
# ## Question 1: blocks (3 points, 10 minutes)
#
# Perplexity is measured over blocks of a fixed length. All texts are tokenized as one long list of token ids, which is cut into blocks from its beginning; what is left over at the end is dropped.
#
# Write `cut_into_blocks(ids, length)`: a list of token ids and a length in, a tensor of shape (blocks, length) out. A list that is too short for one block gives a tensor of shape (0, length).

# %% [raw]
# # BEGIN QUESTION
# name: q1
# points: 3

# %% [raw]
# # BEGIN SOLUTION


# %%
def cut_into_blocks(ids, length):
    """list of token ids -> (blocks, length), dtype int64."""
    # BEGIN SOLUTION
    whole = len(ids) // length
    return torch.tensor(ids[: whole * length], dtype=torch.long).view(whole, length)
    # END SOLUTION


# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 1
"""  # END TEST CONFIG


def test_exact(cut_into_blocks):
    found = cut_into_blocks([5, 6, 7, 8, 9, 10], 3)
    assert found is not None, "cut_into_blocks returned None: write its body"
    expected = [[5, 6, 7], [8, 9, 10]]
    assert found.tolist() == expected, f"blocks of [5, 6, 7, 8, 9, 10], 3: expected {expected}, found {found.tolist()}"


# %%
""" # BEGIN TEST CONFIG
points: 1
hidden: true
"""  # END TEST CONFIG


def test_rest(cut_into_blocks):
    found = cut_into_blocks(list(range(11)), 4)
    expected = [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert found.tolist() == expected, (
        f"11 tokens in blocks of 4, the rest dropped: expected {expected}, found {found.tolist()}"
    )


# %%
""" # BEGIN TEST CONFIG
points: 1
hidden: true
"""  # END TEST CONFIG


def test_too_short(cut_into_blocks):
    found = tuple(cut_into_blocks([1, 2], 4).shape)
    assert found == (0, 4), f"2 tokens, blocks of 4: expected shape (0, 4), found {found}"


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 2: how surprised is the model? (4 points, 20 minutes)
#
# A causal language model gives, at every position, logits for the *next* token. The negative log-likelihood of a block is the mean over the tokens 2, 3, ... of $-\log p(\text{token} \mid \text{tokens before it})$; nothing predicts the first token.
#
# Write `mean_nll(logits, blocks)`: the mean over all tokens of all blocks that are predicted. Compute in float32 even when the logits are not.

# %% [raw]
# # BEGIN QUESTION
# name: q2
# points: 4

# %% [raw]
# # BEGIN SOLUTION


# %%
def mean_nll(logits, blocks):
    """logits (blocks, length, vocabulary), blocks (blocks, length) -> float, in nats per token."""
    # BEGIN SOLUTION
    predicted = logits[:, :-1].float().log_softmax(-1)
    return -predicted.gather(-1, blocks[:, 1:, None]).mean().item()
    # END SOLUTION


# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 1
"""  # END TEST CONFIG


def test_knows_nothing(mean_nll):
    import math
    import torch

    found = mean_nll(torch.zeros(2, 5, 7), torch.randint(0, 7, (2, 5)))
    assert found is not None, "mean_nll returned None: write its body"
    assert abs(found - math.log(7)) < 1e-5, (
        f"a model that knows nothing of 7 tokens: expected ln 7 = {math.log(7):.4f}, found {found:.4f}"
    )


# %%
""" # BEGIN TEST CONFIG
points: 2
hidden: true
"""  # END TEST CONFIG


def test_the_next_token(mean_nll):
    import torch

    blocks = torch.tensor([[0, 1, 2, 3, 0]])
    logits = torch.full((1, 5, 4), -20.0)
    for position, following in enumerate([1, 2, 3, 0]):
        logits[0, position, following] = 20.0
    found = mean_nll(logits, blocks)
    assert abs(found) < 1e-3, f"a model that is always sure of the right next token: expected 0, found {found:.4f}"


# %%
""" # BEGIN TEST CONFIG
points: 1
hidden: true
"""  # END TEST CONFIG


def test_half_precision(mean_nll):
    import math
    import torch

    blocks = torch.tensor([[1, 0, 1], [1, 1, 1]])
    logits = torch.zeros(2, 3, 2, dtype=torch.float16)
    logits[1, :, 1] = 8.0
    expected = (2 * math.log(2) + 2 * math.log(1 + math.exp(-8))) / 4
    found = float(mean_nll(logits, blocks))
    assert abs(found - expected) < 1e-6, f"float16 logits, two blocks: expected {expected:.6f}, found {found:.6f}"


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 3: a real model (3 points, 15 minutes)
#
# Perplexity is $e$ to the mean negative log-likelihood: among how many equally likely tokens the model would be as unsure as it is. Measure it on held-out news. The vocabulary has tens of thousands of entries, so take a few blocks at a time through the model; every block counts the same.

# %%
model, tokenizer = sources.load_model(), sources.load_tokenizer()
texts = sources.load_texts("news", "held-out")
ids = tokenizer("\n\n".join(texts))["input_ids"][:1024]

# %% [raw]
# # BEGIN QUESTION
# name: q3
# points: 3

# %% [raw]
# # BEGIN SOLUTION

# %%
blocks = cut_into_blocks(ids, 128)  # SOLUTION

# %%
# BEGIN SOLUTION
with torch.no_grad():
    total = sum(mean_nll(model(some).logits, some) * len(some) for some in blocks.split(4))
# END SOLUTION
news_perplexity = math.exp(total / len(blocks))  # SOLUTION

# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 1
"""  # END TEST CONFIG


def test_is_a_perplexity(news_perplexity):
    assert isinstance(news_perplexity, float), f"news_perplexity: expected a float, found {news_perplexity!r}"
    assert 1 < news_perplexity < float("inf"), f"news_perplexity: expected above 1, found {news_perplexity}"


# %%
""" # BEGIN TEST CONFIG
points: 2
hidden: true
"""  # END TEST CONFIG


def test_is_the_librarys(news_perplexity, blocks, model):
    from slimllm_nb import evaluation

    expected = evaluation.perplexity(model, blocks, progress=False)
    assert abs(news_perplexity / expected - 1) < 1e-3, (
        f"perplexity over your blocks: expected {expected:.2f}, found {news_perplexity:.2f}"
    )


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 4: a covariance, batch by batch (6 points, 30 minutes)
#
# Which heads and channels matter is read off covariances of activations over thousands of tokens. The activations of all tokens do not fit in memory, those of a few samples do. So the mean and the covariance are updated with every batch of rows, and must come out as over all rows at once, whatever the size of the batches.
#
# For the covariance divide by the number of rows $n$ (not $n - 1$: it is that of these tokens, not an estimate for others). Mind that
#
# $$\frac1n\sum_t x_t x_t^\top - \bar x \bar x^\top$$
#
# subtracts two large numbers when the mean is large beside the deviations. LLaMA has such activations. Sum in float64, around something near the mean.

# %% [raw]
# # BEGIN QUESTION
# name: q4
# points: 6

# %% [raw]
# # BEGIN SOLUTION


# %%
class RunningCovariance:
    """update(rows) as often as there are batches; then .mean (width,) and .covariance (width, width), float64."""

    def __init__(self):
        # BEGIN SOLUTION
        self.count = 0
        # END SOLUTION

    def update(self, rows):
        """rows: (tokens, width)."""
        # BEGIN SOLUTION
        rows = rows.double()
        if self.count == 0:
            self.near = rows.mean(0)
            self.sum, self.squares = torch.zeros_like(self.near), rows.new_zeros(rows.shape[1], rows.shape[1])
        rows = rows - self.near
        self.count += len(rows)
        self.sum += rows.sum(0)
        self.squares += rows.T @ rows
        # END SOLUTION

    @property
    def mean(self):
        return self.near + self.sum / self.count  # SOLUTION

    @property
    def covariance(self):
        # BEGIN SOLUTION
        off = self.sum / self.count
        return self.squares / self.count - torch.outer(off, off)
        # END SOLUTION


# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 1
"""  # END TEST CONFIG


def test_by_hand(RunningCovariance):
    import torch

    running = RunningCovariance()
    running.update(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert running.mean is not None, "mean is None: write update and mean"
    assert running.mean.tolist() == [2.0, 4.0], (
        f"mean of (1, 2) and (3, 6): expected [2, 4], found {running.mean.tolist()}"
    )
    expected = [[1.0, 2.0], [2.0, 4.0]]
    assert running.covariance.tolist() == expected, (
        f"covariance of (1, 2) and (3, 6): expected {expected}, found {running.covariance.tolist()}"
    )


# %%
""" # BEGIN TEST CONFIG
points: 2
hidden: true
"""  # END TEST CONFIG


def test_uneven_batches(RunningCovariance):
    import torch

    rows = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0, 3.0])
    rows[:7] += 4
    running = RunningCovariance()
    for batch in rows.split([7, 1, 40, 12]):
        running.update(batch)
    expected = torch.cov(rows.double().T, correction=0)
    off = (running.covariance - expected).abs().max().item()
    assert off < 1e-6, (
        f"batches of 7, 1, 40 and 12 rows: expected the covariance of all 60 rows, found one that is off by {off:.3g}"
    )


# %%
""" # BEGIN TEST CONFIG
points: 2
hidden: true
"""  # END TEST CONFIG


def test_large_mean(RunningCovariance):
    import torch

    rows = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1)) + 30000
    running = RunningCovariance()
    for batch in rows.split(500):
        running.update(batch)
    expected = torch.cov(rows.double().T, correction=0)
    off = (running.covariance - expected).abs().max().item()
    assert off < 0.01, (
        f"values near 30000 that vary by 1: expected a covariance within 0.01, found one that is off by {off:.3g}"
    )


# %%
""" # BEGIN TEST CONFIG
points: 1
hidden: true
"""  # END TEST CONFIG


def test_one_row(RunningCovariance):
    import torch

    running = RunningCovariance()
    running.update(torch.tensor([[1.0, -2.0]]))
    found = running.covariance.tolist()
    assert found == [[0.0, 0.0], [0.0, 0.0]], f"covariance of a single row: expected zeros, found {found}"


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 5: what may be looked at (4 points, written, 15 minutes)
#
# A colleague prunes a model with samples of a corpus, measures its perplexity on *the same samples*, and reports that pruning costs 5 %. In four to eight sentences: why is that number too good although nothing was trained, what should be measured instead, and how would you find out how much too good it is? Name two texts at hand in this package for your experiment.

# %% [raw]
# # BEGIN QUESTION
# name: q5
# manual: true
# points: 4

# %% [raw]
# # BEGIN SOLUTION

# %% [markdown]
# *One point each.* (1) Something was fitted: which heads and channels go, a scale and a shift for every output are the best ones for those tokens. (2) Held-out documents must be measured, split by document, not by window, because windows of one document resemble each other. (3) The experiment: prune once, measure on the calibration samples and on held-out documents of the same corpus, relative to the dense model on each; over several draws of samples, since one draw proves little. (4) Names such as news, calibration against held-out split, and a corpus that nothing was calibrated on (Hamlet) to see what is lost off-domain.

# %% [raw]
# # END SOLUTION

# %% [raw]
# # END QUESTION
