"""The option `even_groups` of head selections: every key/value head that stays serves as many query heads.

vLLM takes no others, so such a checkpoint is served as it is, and nothing is written down twice
(export.to_even_groups). The heads of a layer then stay as g groups of s; of what g * s can be, the number nearest to
the one that is asked for is kept, of two the larger. With a number of parameters as the target, channels make up the
difference.
"""

from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from slimllm_nb import heads


def even_sizes(owner: Int[Tensor, "heads"], num_pruned: int) -> list[tuple[int, int]]:
    """The pairs (groups, heads of each) whose product is nearest to what is to be kept.

    owner: the key/value head that each query head reads.
    """
    counts, wanted = owner.bincount(), len(owner) - num_pruned
    possible = [(g, s) for s in range(1, counts.max() + 1) for g in range(1, (counts >= s).sum() + 1)]
    nearest = min((abs(g * s - wanted), -g * s) for g, s in possible)
    return [(g, s) for g, s in possible if (abs(g * s - wanted), -g * s) == nearest]


def may_go(alive: Bool[Tensor, "heads"], owner: Int[Tensor, "heads"], groups: int, size: int) -> Bool[Tensor, "heads"]:
    """Those of the heads that are left without which `groups` groups of `size` can still be made of the others."""
    counts = owner[alive].bincount(minlength=len(owner))
    spare = (counts >= size).sum() > groups
    return alive & ((counts != size) | spare)[owner]


def select_evenly(
    covariance: Float[Tensor, "hidden heads heads"],
    num_pruned: int,
    importance: Float[Tensor, "heads"],
    owner: Int[Tensor, "heads"],
) -> Int[Tensor, "kept"]:
    """heads.select_heads with even groups, the best by similarity of those that even_sizes allows.

    The least important heads go first, where they may; then the greedy search, by exchanges that leave groups even.
    """
    order, found = torch.argsort(importance, stable=True), []
    for groups, size in even_sizes(owner, num_pruned):
        alive = torch.ones_like(owner, dtype=torch.bool)
        for head in order:  # one that may not go in its turn may not go later either
            alive[head] = not may_go(alive, owner, groups, size)[head]
        allowed = partial(_stays_even, owner, size)
        found.append(heads.greedy_search(covariance, alive.nonzero().flatten(), order[~alive[order]], allowed))
    return max(found, key=lambda kept: heads.similarity(covariance, kept))


def _stays_even(
    owner: Int[Tensor, "heads"], size: int, kept: Int[Tensor, "kept"], candidate: Int[Tensor, ""]
) -> Bool[Tensor, "kept"]:
    """Within a group; and for a group of one, another group of one."""
    same = owner[kept] == owner[candidate]
    return same if size > 1 or same.any() else ~same
