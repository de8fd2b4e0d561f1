"""Which attention heads matter: similarity of the output without them (paper section 4.1).

The attention output is a sum of head contributions P_h = X_h W_O^h. For a set S of heads, sim(S) is the sum over the
output dimensions of the Pearson correlation over tokens, in absolute value, between the contributions in S added up and
the full output.

Closed form. Pearson needs covariances alone: with C_j[g, h] the covariance over tokens of the contributions of heads g
and h to output j, cov(sum_S, full) = 1_S' C_j 1 and var(sum_S) = 1_S' C_j 1_S. And C_j[g, h] = W_g[j]' Sigma_gh W_h[j]
follows from Sigma, the covariance of the input of `o_proj`: the activations are read once, whatever the search tries.

Statistics are float64 (tens of thousands of tokens are summed and near ties decide which head goes).
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from slimllm_nb.regression import variance_floor


def head_covariance(
    head_inputs: Float[Tensor, "tokens heads head_dim"],
    output_weight: Float[Tensor, "hidden heads*head_dim"],
) -> Float[Tensor, "hidden heads heads"]:
    """Covariance over tokens of the heads' contributions, for every output dimension.

    `head_inputs` is the input of `o_proj`, `output_weight` is `o_proj.weight`. Float64. Paper section 4.1.
    """
    sigma = torch.cov(head_inputs.double().flatten(1).T, correction=0)  # (heads * head_dim, heads * head_dim)
    return covariance_of_contributions(sigma, output_weight, head_inputs.shape[1])


def covariance_of_contributions(
    sigma: Float[Tensor, "width width"], output_weight: Float[Tensor, "hidden width"], heads: int
) -> Float[Tensor, "hidden heads heads"]:
    """C from Sigma, the covariance of the `o_proj` input: C_j[g, h] = W_g[j]' Sigma_gh W_h[j]. Float64."""
    weight, size = output_weight.to(sigma), len(sigma) // heads
    covariance = sigma.new_empty(len(weight), heads, heads)
    for head in range(heads):  # C_j is symmetric: head by head, with itself and the heads behind it
        own, others = slice(head * size, (head + 1) * size), slice(head * size, None)
        products = (weight[:, own] @ sigma[own, others]).mul_(weight[:, others])
        covariance[:, head, head:] = products.unflatten(1, (-1, size)).sum(-1)  # -> (hidden, heads - head)
        covariance[:, head + 1 :, head] = covariance[:, head, head + 1 :]
    return covariance


def kept_and_full(
    covariance: Float[Tensor, "hidden heads heads"], sets: Int[Tensor, "sets kept"]
) -> tuple[Float[Tensor, "hidden sets"], Float[Tensor, "hidden sets"], Float[Tensor, "hidden 1"]]:
    """For every output dimension and set of heads: cov(the set's output, full output), var(the set's output); and
    var(full output)."""
    indicators = covariance.new_zeros(len(sets), covariance.shape[1]).scatter_(1, sets, 1).T  # (heads, sets)
    within = ((covariance @ indicators) * indicators).sum(1)
    return covariance.sum(2) @ indicators, within, covariance.sum((1, 2))[:, None]


def similarity(
    covariance: Float[Tensor, "hidden heads heads"], kept: Int[Tensor, "*sets kept"]
) -> Float[Tensor, "*sets"]:
    """sim(S), for one set of heads or several: sum over outputs of the Pearson correlation of the kept heads' summed
    contribution with the full output.

    Between 0 and `hidden`; an output that does not vary counts as 0. Paper eq. 3 (per output dimension, in absolute
    value, as in the authors' code).
    """
    cov, var_kept, var_full = kept_and_full(covariance, kept.reshape(-1, kept.shape[-1]))
    floor = variance_floor(var_full)
    pearson = cov.abs() / (var_kept.clamp_min(floor) * var_full.clamp_min(floor)).sqrt()
    return torch.where((var_kept > floor) & (var_full > floor), pearson, 0).sum(0).view(kept.shape[:-1])


def head_importance(covariance: Float[Tensor, "hidden heads heads"]) -> Float[Tensor, "heads"]:
    """-sim(all heads but h) for every head h: higher means more important. Paper eq. 4."""
    heads = torch.arange(covariance.shape[1], device=covariance.device)
    others = heads.repeat(len(heads), 1)[heads != heads[:, None]].view(len(heads), -1)
    return -similarity(covariance, others)


def select_heads(
    covariance: Float[Tensor, "hidden heads heads"],
    num_pruned: int,
    greedy: bool = True,
    importance: Float[Tensor, "heads"] | None = None,
) -> Int[Tensor, "kept"]:
    """The heads to keep, sorted, after `num_pruned` of them go. Paper Algorithm 1.

    The `num_pruned` least important heads are the first guess. Greedy search: each of them, from the least important
    on, is tried in the place of every kept head; the best exchange is made if it raises sim(kept).
    importance: another first guess than head_importance(covariance).
    Raises: ValueError unless 0 <= num_pruned < heads.
    """
    heads = covariance.shape[1]
    if not 0 <= num_pruned < heads:
        raise ValueError(f"num_pruned is {num_pruned}; allowed: 0 to {heads - 1} (a layer keeps at least one head)")
    order = torch.argsort(head_importance(covariance) if importance is None else importance, stable=True)
    pruned, kept = order[:num_pruned], order[num_pruned:].sort().values
    return greedy_search(covariance, kept, pruned) if greedy else kept


def greedy_search(
    covariance: Float[Tensor, "hidden heads heads"],
    kept: Int[Tensor, "kept"],
    candidates: Int[Tensor, "candidates"],
    allowed: Callable[[Tensor, Tensor], Bool[Tensor, "kept"]] | None = None,
) -> Int[Tensor, "kept"]:
    """The loop of Algorithm 1. allowed(kept, candidate): the positions that may be exchanged; None: every one."""
    best = similarity(covariance, kept)
    for candidate in candidates:
        exchanges = exchange_similarities(covariance, kept, candidate)
        if allowed is not None:
            exchanges = exchanges.where(allowed(kept, candidate), -torch.inf)
        position = exchanges.argmax()
        if exchanges[position] > best:
            best = exchanges[position]
            kept = kept.index_fill(0, position, candidate.item())
    return kept.sort().values


def exchange_similarities(
    covariance: Float[Tensor, "hidden heads heads"], kept: Int[Tensor, "kept"], candidate: Int[Tensor, ""]
) -> Float[Tensor, "kept"]:
    """sim(kept with `candidate` in the place of kept[i]) for every position i."""
    return similarity(covariance, kept.repeat(len(kept), 1).fill_diagonal_(candidate))
