"""Scores that are known within bounds: exact where a selection needs them, and nowhere else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Approximate:
    """Scores, each within its bound of the true one; `exactly(indices)` gives some of them as they are."""

    values: Tensor
    bounds: Tensor
    exactly: Callable[[Int[Tensor, "some"]], Tensor]

    def settled(self, selection: Callable[[Mapping], Tensor], num_pruned: int) -> Tensor:
        """Scores by which a selection `by_rank` chooses as by the true ones."""
        ranks = torch.arange(len(self.values), dtype=torch.float64)
        stays = torch.zeros(len(ranks), dtype=torch.bool)
        stays[selection({"scores": ranks, "num_pruned": num_pruned})] = True
        open_ones = self.undecided((stays[1:] != stays[:-1]).nonzero().flatten() + 1)
        values = self.values.clone()
        values[open_ones] = self.exactly(open_ones.nonzero().flatten())
        return values

    def undecided(self, cuts: Int[Tensor, "cuts"]) -> Bool[Tensor, "scores"]:
        """Which scores may lie on either side of a cut: the bounds leave open whether they are among the lowest `cut`.

        The true border is no lower than the same border of the lower ends, and no higher than that of the upper ends.
        """
        low, high = self.values - self.bounds, self.values + self.bounds
        low_ends, high_ends = low.sort().values, high.sort().values
        found = torch.zeros(len(low), dtype=torch.bool, device=low.device)
        for cut in cuts.tolist():
            # The border lies between the cut-th score and the one above it.
            found |= (high >= low_ends[cut - 1]) & (low <= high_ends[cut])
        return found
