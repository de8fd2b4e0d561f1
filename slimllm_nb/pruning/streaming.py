"""Statistics gathered batch by batch, the same as over all tokens at once.

Sums are float64 and centred on each batch's own mean before they are merged (Chan, Golub and LeVeque, 1979): a naive
sum of squares loses the variance of an output whose mean is large, and LLaMA has such outputs.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from slimllm_nb.regression import Moments


class RunningScatter:
    """Mean and centred scatter matrix (rows - mean)'(rows - mean) over all tokens seen; or only its diagonal."""

    def __init__(self, diagonal: bool = False) -> None:
        self.count, self.only_diagonal = 0, diagonal

    def update(self, rows: Float[Tensor, "tokens width"]) -> None:
        rows = rows.double()
        mean = rows.mean(0)
        rows = rows - mean
        self._add(len(rows), mean, rows.square().sum(0) if self.only_diagonal else rows.T @ rows)

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self.count == 0:
            self.count, self.mean, self.scatter = count, mean, scatter
            return
        total, step = self.count + count, mean - self.mean
        between = step.square() if self.only_diagonal else torch.outer(step, step)
        self.scatter += scatter + between * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total

    def merged(self, other: "RunningScatter") -> "RunningScatter":
        """Over the tokens that either has seen."""
        both = RunningScatter(self.only_diagonal)
        both._add(self.count, self.mean, self.scatter.clone())
        both._add(other.count, other.mean, other.scatter)
        return both

    def diagonal(self) -> Float[Tensor, "width"]:
        return self.scatter if self.only_diagonal else self.scatter.diagonal()

    @property
    def total(self) -> Tensor:
        return self.scatter


class RunningNorms:
    """L2 norms of the columns over all tokens seen."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0

    def update(self, rows: Float[Tensor, "tokens width"]) -> None:
        self.total = self.total + rows.double().square().sum(0)

    @property
    def norms(self) -> Float[Tensor, "width"]:
        return self.total.sqrt()


class RunningMoments:
    """Moments of kept and full outputs (see regression.Moments) over all tokens seen."""

    def __init__(self) -> None:
        self.count = 0

    def update(self, batch: Moments, count: int) -> None:
        if self.count == 0:
            self.count, self.moments = count, batch
            return
        old, total = self.moments, self.count + count
        new_share = count / total
        step_kept, step_full = batch.mean_kept - old.mean_kept, batch.mean_full - old.mean_full
        between = new_share * (1 - new_share)
        self.moments = Moments(
            mean_kept=old.mean_kept + new_share * step_kept,
            mean_full=old.mean_full + new_share * step_full,
            var_kept=torch.lerp(old.var_kept, batch.var_kept, new_share) + between * step_kept.square(),
            var_full=torch.lerp(old.var_full, batch.var_full, new_share) + between * step_full.square(),
            cov=torch.lerp(old.cov, batch.cov, new_share) + between * step_kept * step_full,
        )
        self.count = total
