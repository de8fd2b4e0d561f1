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
# name: a2_heads
# export_cell: false
# check_all_cell: true
# show_question_points: true
# tests:
#   ok_format: false

# %% [markdown]
# # Assignment 2 · Attention heads: from Pearson to a closed form
#
# | | |
# |---|---|
# | Points | 26 (22 graded by themselves, 4 by a reader) |
# | Time | 90 to 120 minutes |
# | Difficulty | medium |
# | After | notebook `02_head_importance`, paper section 4.1 |
#
# **Goal.** Score attention heads by how similar the attention output stays without them, search for the heads to keep, and then do all of it again without looking at a single activation twice.
#
# Write your code where a cell says `...`; `grader.check("q1")` runs the tests that you can see. Run the notebook from top to bottom before you hand it in.

# %%
import torch

from slimllm_nb import calibration, heads, sources

# %% [markdown]
# ## Question 1: what a head contributes (3 points, 10 minutes)
#
# In head $h$ every token adds up the values of the tokens up to itself, weighted by the head's attention pattern $A_h$ (tokens, tokens): $X_h = A_h V_{g(h)}$. With grouped queries several heads read the same values: of $H$ heads and $G$ key/value heads, head $h$ reads $g(h) = \lfloor h / (H/G) \rfloor$. The attention output is linear in all of this: $Y = \sum_h P_h$ with $P_h = A_h V_{g(h)} W_O^h$, where $W_O^h$ is the head's share of the projection. In PyTorch `o_proj.weight` is stored the other way round, (hidden, heads * head_dim), head after head.
#
# From patterns, values and weight to every head's contribution $P_h$:

# %% [raw]
# # BEGIN QUESTION
# name: q1
# points: 3

# %% [raw]
# # BEGIN SOLUTION


# %%
def contributions(patterns, values, weight):
    """patterns (heads, tokens, tokens), values (key_value_heads, tokens, head_dim), weight (hidden, heads * head_dim).

    Returns (heads, tokens, hidden).
    """
    # BEGIN SOLUTION
    heads, head_dim = len(patterns), values.shape[2]
    read = values.repeat_interleave(heads // len(values), dim=0)  # (heads, tokens, head_dim)
    shares = weight.view(len(weight), heads, head_dim)
    return torch.einsum("hts,hsd,ohd->hto", patterns, read, shares)
    # END SOLUTION


# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 1
"""  # END TEST CONFIG


def test_shape(contributions):
    import torch

    found = contributions(torch.ones(2, 5, 5), torch.ones(2, 5, 3), torch.ones(4, 6))
    assert found is not None, "contributions returned None: write its body"
    assert tuple(found.shape) == (2, 5, 4), (
        f"2 heads, 5 tokens, hidden 4: expected (2, 5, 4), found {tuple(found.shape)}"
    )


# %%
""" # BEGIN TEST CONFIG
points: 1
hidden: true
"""  # END TEST CONFIG


def test_as_transformers_adds_them_up(contributions):
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=3)
    config._attn_implementation = "eager"
    attention, hidden = LlamaAttention(config, 0), torch.randn(1, 6, 12)
    no_rotation = torch.ones(1, 6, 3), torch.zeros(1, 6, 3)
    with torch.no_grad():
        output, patterns = attention(hidden, no_rotation, None)
        values = attention.v_proj(hidden).view(6, 2, 3).transpose(0, 1)
        found = contributions(patterns[0], values, attention.o_proj.weight).sum(0)
    off = (found - output[0]).abs().max().item()
    assert off < 1e-5, (
        f"4 heads on 2 key/value heads: expected transformers' output, found one that is off by {off:.3g}"
    )


# %%
""" # BEGIN TEST CONFIG
points: 1
hidden: true
"""  # END TEST CONFIG


def test_each_head_its_own(contributions):
    import torch

    values = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    weight = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    found = contributions(torch.ones(2, 1, 1), values, weight).flatten().tolist()
    assert found == [21.0, 4300.0], f"two heads of width 2, one output: expected [21, 4300], found {found}"


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 2: how similar is the output of some heads? (5 points, 20 minutes)
#
# For a set $S$ of heads the similarity is a sum over the outputs $j$:
#
# $$\mathrm{sim}(S) = \sum_j \left|\mathrm{corr}_t\Big(\sum_{h \in S} P_h[t, j],\; Y[t, j]\Big)\right|$$
#
# with the Pearson correlation over the tokens $t$. An output that does not vary, in the sum or in $Y$, counts as 0. This is the literal version; it may be slow.

# %% [raw]
# # BEGIN QUESTION
# name: q2
# points: 5

# %% [raw]
# # BEGIN SOLUTION


# %%
def similarity(p, kept):
    """p (heads, tokens, hidden), kept: list of heads -> float between 0 and hidden."""
    # BEGIN SOLUTION
    part, full = p[list(kept)].sum(0).double(), p.sum(0).double()
    part, full = part - part.mean(0), full - full.mean(0)
    lengths = part.norm(dim=0) * full.norm(dim=0)
    varies = lengths > 1e-12
    return ((part * full).sum(0).abs() / lengths.where(varies, torch.ones_like(lengths)))[varies].sum().item()
    # END SOLUTION


# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 1
"""  # END TEST CONFIG


def test_all_heads(similarity):
    import torch

    found = similarity(torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(0)), [0, 1, 2])
    assert found is not None, "similarity returned None: write its body"
    assert abs(found - 4) < 1e-4, f"all heads are kept, 4 outputs: expected 4, found {found}"


# %%
""" # BEGIN TEST CONFIG
points: 2
hidden: true
"""  # END TEST CONFIG


def test_against_numpy(similarity):
    import numpy as np
    import torch

    p = torch.randn(4, 30, 5, generator=torch.Generator().manual_seed(1)) + torch.arange(4).view(4, 1, 1) * 3
    part, full = p[[0, 2]].sum(0).numpy(), p.sum(0).numpy()
    expected = sum(abs(np.corrcoef(part[:, j], full[:, j])[0, 1]) for j in range(5))
    found = similarity(p, [0, 2])
    assert abs(found - expected) < 1e-4, (
        f"4 heads with means, 5 outputs, heads 0 and 2: expected {expected:.4f}, found {found:.4f}"
    )


# %%
""" # BEGIN TEST CONFIG
points: 1
hidden: true
"""  # END TEST CONFIG


def test_sign_does_not_count(similarity):
    import torch

    signal = torch.tensor([[1.0], [2.0], [4.0]])
    found = similarity(torch.stack([-signal, 3 * signal]), [0])
    assert abs(found - 1) < 1e-6, f"a head that is minus half of the output: expected |corr| = 1, found {found}"


# %%
""" # BEGIN TEST CONFIG
points: 1
hidden: true
"""  # END TEST CONFIG


def test_what_does_not_vary(similarity):
    import torch

    p = torch.ones(2, 4, 3)
    p[1, :, 0] = torch.arange(4.0)
    found = similarity(p, [1])
    assert abs(found - 1) < 1e-6, f"of 3 outputs only the first varies: expected 1, found {found}"


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 3: the score of a head (2 points, 5 minutes)
#
# $I_h = -\,\mathrm{sim}(\text{all heads but } h)$: the more important, the higher.

# %% [raw]
# # BEGIN QUESTION
# name: q3
# points: 2

# %% [raw]
# # BEGIN SOLUTION


# %%
def head_scores(similarity_of, count):
    """similarity_of: function from a list of heads to a float; count: how many heads -> (count,) scores."""
    # BEGIN SOLUTION
    return torch.tensor([-similarity_of([h for h in range(count) if h != gone]) for gone in range(count)])
    # END SOLUTION


# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 2
"""  # END TEST CONFIG


def test_scores(head_scores):
    found = head_scores(lambda kept: float(sum(2**head for head in kept)), 3)
    assert found is not None, "head_scores returned None: write its body"
    assert [float(one) for one in found] == [-6.0, -5.0, -3.0], (
        f"sim(S) = sum of 2^h: expected scores [-6, -5, -3], found {[float(one) for one in found]}"
    )


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 4: the closed form (7 points, 30 minutes)
#
# Correlations need covariances alone. With $C_j[g, h]$ the covariance over tokens of the contributions of heads $g$ and $h$ to output $j$, and $1_S$ the vector that is 1 on $S$,
#
# $$\mathrm{sim}(S) = \sum_j \frac{|1_S^\top C_j 1|}{\sqrt{(1_S^\top C_j 1_S)(1^\top C_j 1)}}, \qquad C_j[g, h] = W_O^g[:, j]^\top\, \Sigma_{gh}\, W_O^h[:, j],$$
#
# where $\Sigma$ is the covariance (divided by the number of tokens) of the input of `o_proj`. Write both, in float64.

# %% [raw]
# # BEGIN QUESTION
# name: q4
# points: 7

# %% [raw]
# # BEGIN SOLUTION


# %%
def contribution_covariance(x, weight):
    """x (tokens, heads, head_dim), weight (hidden, heads * head_dim) -> (hidden, heads, heads), float64."""
    # BEGIN SOLUTION
    x = x.double()
    centred = x - x.mean(0)
    sigma = torch.einsum("tga,thb->gahb", centred, centred) / len(x)
    shares = weight.double().view(len(weight), x.shape[1], x.shape[2])
    return torch.einsum("jga,gahb,jhb->jgh", shares, sigma, shares)
    # END SOLUTION


# %%
def closed_similarity(covariance, kept):
    """covariance (hidden, heads, heads), all of whose outputs vary; kept: list of heads -> float."""
    # BEGIN SOLUTION
    rows = covariance[:, list(kept)]
    with_full, own = rows.sum((1, 2)), rows[:, :, list(kept)].sum((1, 2))
    return (with_full.abs() / (own * covariance.sum((1, 2))).sqrt()).sum().item()
    # END SOLUTION


# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 1
"""  # END TEST CONFIG


def test_by_hand(contribution_covariance):
    import torch

    x = torch.tensor([[[1.0], [0.0]], [[3.0], [4.0]]])
    found = contribution_covariance(x, torch.tensor([[1.0, 2.0]]))
    assert found is not None, "contribution_covariance returned None: write its body"
    expected = [[[1.0, 4.0], [4.0, 16.0]]]
    assert found.tolist() == expected, f"two heads of width 1, two tokens: expected {expected}, found {found.tolist()}"


# %%
""" # BEGIN TEST CONFIG
points: 3
hidden: true
"""  # END TEST CONFIG


def test_against_numpy(contribution_covariance):
    import numpy as np
    import torch

    def case(seed):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(50, 6, generator=generator) @ torch.randn(6, 18, generator=generator)
        rows = rows + 0.1 * torch.randn(50, 18, generator=generator) + torch.randn(18, generator=generator)
        return rows.view(50, 6, 3), torch.randn(10, 18, generator=generator)

    x, weight = case(0)
    found = contribution_covariance(x, weight)
    shares = weight.view(10, 6, 3)
    for j in range(10):
        rows = np.stack([(x[:, h].double() @ shares[j, h].double()).numpy() for h in range(6)])
        off = abs(found[j].numpy() - np.cov(rows, bias=True)).max()
        assert off < 1e-6, (
            f"output {j}: expected numpy's covariance of the contributions, found one that is off by {off:.3g}"
        )


# %%
""" # BEGIN TEST CONFIG
points: 3
hidden: true
"""  # END TEST CONFIG


def test_similarity(closed_similarity):
    import torch
    from slimllm_nb import heads

    def case(seed):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(50, 6, generator=generator) @ torch.randn(6, 18, generator=generator)
        rows = rows + 0.1 * torch.randn(50, 18, generator=generator) + torch.randn(18, generator=generator)
        return rows.view(50, 6, 3), torch.randn(10, 18, generator=generator)

    covariance = heads.head_covariance(*case(1))
    for kept in ([0, 1], [5], [0, 2, 3, 4, 5]):
        expected = heads.similarity(covariance, torch.tensor(kept)).item()
        found = closed_similarity(covariance, kept)
        assert abs(found - expected) < 1e-6, f"heads {kept} of 6: expected {expected:.6f}, found {found:.6f}"


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 5: the greedy search (3 points, 20 minutes)
#
# Algorithm 1: the `num_pruned` heads with the lowest scores are the first guess for removal. Then each of them, from the least important on, is tried in the place of every kept head; the best exchange is made if it raises the similarity.

# %% [raw]
# # BEGIN QUESTION
# name: q5
# points: 3

# %% [raw]
# # BEGIN SOLUTION


# %%
def greedy_search(similarity_of, scores, num_pruned):
    """similarity_of: function from a list of heads to a float; scores: (heads,).

    -> sorted list of the heads to keep.
    """
    # BEGIN SOLUTION
    order = torch.argsort(torch.as_tensor(scores), stable=True).tolist()
    kept, best = sorted(order[num_pruned:]), similarity_of(sorted(order[num_pruned:]))
    for candidate in order[:num_pruned]:
        tried = [[*kept[:i], candidate, *kept[i + 1 :]] for i in range(len(kept))]
        values = [similarity_of(one) for one in tried]
        if max(values) > best:
            best, kept = max(values), tried[values.index(max(values))]
    return sorted(kept)
    # END SOLUTION


# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 1
"""  # END TEST CONFIG


def test_nothing_to_gain(greedy_search):
    found = greedy_search(lambda kept: 1.0, [0.0, 1.0, 2.0, 3.0], 2)
    assert found is not None, "greedy_search returned None: write its body"
    assert list(found) == [2, 3], f"scores 0, 1, 2, 3, two go, no exchange helps: expected [2, 3], found {list(found)}"


# %%
""" # BEGIN TEST CONFIG
points: 2
hidden: true
"""  # END TEST CONFIG


def test_as_the_library(greedy_search):
    import torch
    from slimllm_nb import heads

    def case(seed):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(50, 6, generator=generator) @ torch.randn(6, 18, generator=generator)
        rows = rows + 0.1 * torch.randn(50, 18, generator=generator) + torch.randn(18, generator=generator)
        return rows.view(50, 6, 3), torch.randn(10, 18, generator=generator)

    for seed in range(6):
        covariance = heads.head_covariance(*case(seed))
        expected = heads.select_heads(covariance, 3).tolist()
        found = greedy_search(
            lambda kept, c=covariance: heads.similarity(c, torch.tensor(kept)).item(),
            heads.head_importance(covariance),
            3,
        )
        assert list(found) == expected, f"case {seed}, 3 of 6 heads go: expected {expected}, found {list(found)}"


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 6: what it costs (2 points, 10 minutes)
#
# How many sets $S$ does the whole procedure look at (scores and search, without the similarity of the first guess)? And how many numbers does the literal version read for LLaMA-7B (4,096 tokens, hidden size 4,096, 32 heads, 8 of which go), if for every set that the *search* looks at it adds up the contributions of the heads that are kept?

# %% [raw]
# # BEGIN QUESTION
# name: q6
# points: 2

# %% [raw]
# # BEGIN SOLUTION


# %%
def sets_looked_at(count, num_pruned):
    """How many sets of heads scores and search look at."""
    return count + num_pruned * (count - num_pruned)  # SOLUTION


# %%
numbers_read = 8 * 24 * 24 * 4096 * 4096  # SOLUTION

# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 1
"""  # END TEST CONFIG


def test_sets(sets_looked_at):
    found = sets_looked_at(6, 2)
    assert found is not None and found is not ..., "sets_looked_at returned nothing: write its body"
    assert found == 14, f"6 heads, 2 go: expected 6 for the scores and 2 x 4 for the search, found {found}"


# %%
""" # BEGIN TEST CONFIG
points: 1
hidden: true
"""  # END TEST CONFIG


def test_numbers(numbers_read):
    assert numbers_read != ..., "numbers_read is not set"
    assert abs(numbers_read / 77309411328 - 1) < 0.001, (
        f"numbers read: expected 192 sets x 24 heads x 4096 x 4096, found {numbers_read}"
    )


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 7: on a real layer (4 points, written, 15 minutes)
#
# The cell below prints which heads of one layer of the default model go, by the first guess and after the search, and with twice as many going.

# %%
model, tokenizer = sources.load_model(), sources.load_tokenizer()
texts = sources.load_texts("news", "calibration")
input_ids = calibration.draw_samples(texts, tokenizer, num_samples=8, length=64)
with torch.no_grad():
    hidden = calibration.embed(model, input_ids)
    context = calibration.layer_context(model, hidden)
    for layer in model.model.layers[:12]:
        hidden = layer(hidden, **context)
    layer = model.model.layers[12]
    x = calibration.head_inputs(layer, hidden, context)
covariance = heads.head_covariance(x, layer.self_attn.o_proj.weight)
for number in (2, 4):
    for greedy in (False, True):
        kept = heads.select_heads(covariance, number, greedy=greedy)
        value = heads.similarity(covariance, kept).item()
        how = "after the search" if greedy else "first guess"
        print(f"{number} go, {how}: kept {kept.tolist()}, sim {value:.1f}")

# %% [markdown]
# In four to eight sentences: are the heads that go with two among those that go with four, and must that be so? When can a head with a low score be worth bringing back? The similarity ignores the scale of an output; why is that no loss in this method, and when would it be one?

# %% [raw]
# # BEGIN QUESTION
# name: q7
# manual: true
# points: 4

# %% [raw]
# # BEGIN SOLUTION

# %% [markdown]
# *One point each.* (1) Read off what is printed; it need not be so: the search starts from another guess, and a set is judged as a whole. (2) Two heads that say the same both score low, since either can go without harm; when both are gone, one is worth having back. (3) The regression that follows fits a scale and a shift for every output, which is just what correlation does not see. (4) Without a recovery, or where the scale cannot be folded into the weights, a set whose output has the right shape and the wrong size would be preferred wrongly.

# %% [raw]
# # END SOLUTION

# %% [raw]
# # END QUESTION
