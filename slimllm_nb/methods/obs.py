"""Optimal Brain Surgeon for whole heads and channels, beyond the paper: remove what costs least after recovery.

Hassibi and Stork (1993), as SparseGPT (arXiv 2301.00774), ZipLM (arXiv 2302.04089) and OSSCAR (arXiv 2403.12983) use it
for layers: with H = covariance of the inputs + 1 % of its mean diagonal, removing the group g of columns of W and
letting the others make up for it raises the squared output error by tr(W_g (H^-1_gg)^-1 W_g') / 2.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from slimllm_nb.llama import head_columns
from slimllm_nb.methods.even_groups import even_sizes, may_go
from slimllm_nb.methods.registry import register

DAMPING = 0.01


@register.head_selection("obs")
def obs_heads(input_covariance, output_weight, head_dim, num_pruned, key_value_owner, even_groups=False):
    """Heads go one at a time. With grouped-query attention a query head is the group. even_groups: see
    methods.even_groups; of the sizes that are possible, the one that costs least."""
    given = input_covariance, output_weight, head_dim
    if not even_groups:
        return remove_groups(*given, num_pruned, rounds=num_pruned)[0]
    found = []
    for groups, size in even_sizes(key_value_owner, num_pruned):
        number = len(key_value_owner) - groups * size
        allowed = partial(may_go, owner=key_value_owner, groups=groups, size=size)
        found.append(remove_groups(*given, number, rounds=number, allowed=allowed))
    return min(found, key=lambda one: one[1])[0]


@register.channel_selection("obs")
def obs_channels(input_covariance, output_weight, num_pruned, rounds=16):
    """Channels go in `rounds` rounds of as many."""
    return remove_groups(input_covariance, output_weight, 1, num_pruned, rounds)[0]


def remove_groups(
    covariance: Float[Tensor, "width width"],
    weight: Float[Tensor, "hidden width"],
    size: int,
    num_pruned: int,
    rounds: int,
    allowed: Callable[[Bool[Tensor, "groups"]], Bool[Tensor, "groups"]] = lambda alive: alive,
) -> tuple[Int[Tensor, "kept"], Float[Tensor, ""]]:
    """The groups of `size` neighbouring columns to keep, sorted, after `num_pruned` went in `rounds` rounds, and what
    that cost. allowed: which of those that are left may go.

    What removals change of the inverse is kept as products left @ right, and of the inverse itself only the groups' own
    blocks are brought up to date: a round then writes a few columns, not the whole matrix.
    """
    weight = weight.to(covariance).clone()
    damped = covariance.clone()
    damped.diagonal().add_((DAMPING * covariance.diagonal().mean()).clamp_min(torch.finfo(covariance.dtype).tiny))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    blocks = _own_blocks(inverse, size).clone()
    left, right = inverse.new_empty(len(inverse), 0), inverse.new_empty(0, len(inverse))
    alive = torch.ones(len(blocks), dtype=torch.bool, device=weight.device)
    cost = weight.new_zeros(())
    for this_round in range(rounds):
        # As many in every round as whole groups allow, num_pruned in all.
        number = num_pruned * (this_round + 1) // rounds - num_pruned * this_round // rounds
        if number == 0:
            continue
        costs = _costs(blocks, weight).masked_fill(~allowed(alive), torch.inf)
        going = costs.argsort(stable=True)[:number]
        cost += costs[going].sum()
        alive[going] = False
        columns = head_columns(going, size)
        rows = inverse[columns] - left[columns] @ right  # of the inverse as it stands
        # rows' (rows[:, columns])^-1: how the others make up for these columns
        shares = torch.linalg.solve(rows[:, columns], rows).T
        weight -= weight[:, columns] @ shares.T
        weight[:, columns] = 0  # what is gone must not come back by rounding
        left, right = torch.cat([left, shares], 1), torch.cat([right, rows])
        blocks -= shares.unflatten(0, (-1, size)) @ rows.T.unflatten(0, (-1, size)).mT
        blocks[going] = torch.eye(size, dtype=blocks.dtype, device=blocks.device)
    return alive.nonzero().flatten(), cost


def _own_blocks(matrix: Float[Tensor, "width width"], size: int) -> Float[Tensor, "groups size size"]:
    """The blocks on the diagonal."""
    return matrix.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _costs(blocks: Float[Tensor, "groups size size"], weight: Float[Tensor, "hidden width"]) -> Float[Tensor, "groups"]:
    """tr(W_g (H^-1_gg)^-1 W_g') / 2 for every group."""
    size = blocks.shape[-1]
    if size == 1:
        return weight.square().sum(0) / blocks.flatten() / 2
    grouped = weight.unflatten(1, (-1, size)).permute(1, 2, 0)  # (groups, size, hidden)
    return (grouped * torch.linalg.solve(blocks, grouped)).sum((1, 2)) / 2


OBS = {"head_selection": "obs", "channel_selection": "obs"}
register.method("obs_ridge", **OBS, recovery="ridge")
register.method("obs_heads_ridge", head_selection="obs", recovery="ridge")
