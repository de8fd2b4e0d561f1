"""Statistics gathered batch by batch, the same as over all tokens at once.

Sums are float64. A naive sum of squares loses the variance of an output whose mean is large, and LLaMA has such
outputs: scatter matrices are summed around the first batch's mean, which lies near the mean of all (Chan, Golub and
LeVeque, 1983, section 3: shifted data), moments around each batch's own before they are merged.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from slimllm_nb.chunks import in_chunks
from slimllm_nb.regression import Moments
from slimllm_nb.symmetric import add_gram, mirrored

WIDE = 512  # outputs from which on products are made in float32


class RunningScatter:
    """Mean and centred scatter matrix (rows - mean)'(rows - mean) over all tokens seen; or only its diagonal."""

    def __init__(self, diagonal: bool = False) -> None:
        self.count, self.only_diagonal = 0, diagonal

    def update(self, rows: Float[Tensor, "tokens width"]) -> None:
        width = rows.shape[1]
        # Wide products in float32, each batch's summed up in float64: an error of 1e-6 of the variances, as the
        # activations have it.
        dtype = torch.float32 if width >= WIDE and rows.dtype != torch.float64 else torch.float64
        if self.count == 0:
            self.shift = rows.mean(0, dtype=torch.float64).to(dtype).double()  # any value near the mean will do
            self.sum = torch.zeros_like(self.shift)
            self.squares = self.sum.new_zeros(width if self.only_diagonal else (width, width))
        self.count += len(rows)
        shifted = rows.to(dtype) - self.shift.to(dtype)
        self.sum += shifted.sum(0, dtype=torch.float64)
        if not self.only_diagonal:
            add_gram(self.squares, shifted)
            return
        for (some,) in in_chunks(shifted):
            self.squares += some.double().square().sum(0)

    @property
    def mean(self) -> Float[Tensor, "width"]:
        return self.shift + self.sum / self.count

    @property
    def scatter(self) -> Tensor:
        if self.only_diagonal:
            return self.squares - self.sum.square() / self.count
        return mirrored(self.squares.clone()).addr_(self.sum, self.sum, alpha=-1 / self.count)

    def merged(self, other: "RunningScatter") -> "RunningScatter":
        """Over the tokens that either has seen."""
        both = RunningScatter(self.only_diagonal)
        both.count, both.shift = self.count + other.count, self.shift
        # The other's sums, taken around this one's shift.
        step, count = other.shift - self.shift, other.count
        both.sum = self.sum + other.sum + count * step
        both.squares = self.squares + other.squares
        if self.only_diagonal:
            both.squares += 2 * step * other.sum + count * step.square()
        else:
            both.squares.addr_(step, other.sum).addr_(other.sum, step).addr_(step, step, alpha=count)
        return both

    def diagonal(self) -> Float[Tensor, "width"]:
        squares = self.squares if self.only_diagonal else self.squares.diagonal()
        return squares - self.sum.square() / self.count

    @property
    def total(self) -> Tensor:
        """All that was summed, for a look at whether it is finite."""
        return self.squares.diagonal() if not self.only_diagonal else self.squares


class RunningNorms:
    """L2 norms of the columns over all tokens seen."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0

    def update(self, rows: Float[Tensor, "tokens width"]) -> None:
        for (some,) in in_chunks(rows):
            self.total = self.total + some.to(torch.float64, copy=True).square_().sum(0)

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
