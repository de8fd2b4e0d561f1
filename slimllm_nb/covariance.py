"""Mean, variances and covariance of activations, summed up batch by batch.

Sums are float64, around the first batch's mean: a naive sum of squares loses the variance of an output whose mean is
large, and LLaMA has such outputs (shifted data; Chan, Golub and LeVeque, 1983).
"""

import torch
from jaxtyping import Float
from torch import Tensor

WIDE = 512  # columns from which on a batch is summed in float32, an error of 1e-6 of the variances; batches in float64


class RunningCovariance:
    """Mean and centred scatter matrix (rows - mean)'(rows - mean) over all rows seen; diagonal: only its diagonal."""

    def __init__(self, diagonal: bool = False) -> None:
        self.count, self.diagonal = 0, diagonal

    def update(self, rows: Float[Tensor, "tokens width"], shift: Float[Tensor, "width"] | None = None) -> None:
        """shift: any value near the mean, float64; None: the first rows' mean."""
        precise = rows.shape[1] < WIDE or rows.dtype == torch.float64
        dtype = torch.float64 if precise else torch.float32
        if self.count == 0:
            self.shift = rows.mean(0, dtype=torch.float64).to(dtype).double() if shift is None else shift
            self.sum = torch.zeros_like(self.shift)
            self.squares = self.sum.new_zeros(rows.shape[1:] if self.diagonal else rows.shape[1:] * 2)
        self.count += len(rows)
        shifted = rows.to(dtype) - self.shift.to(dtype)
        self.sum += shifted.sum(0)
        self.squares += torch.linalg.vecdot(shifted, shifted, dim=0) if self.diagonal else shifted.T @ shifted

    def without(self, some: "RunningCovariance") -> "RunningCovariance":
        """Over the rows that were seen here and not there; both have the same shift."""
        rest = RunningCovariance(self.diagonal)
        rest.count, rest.shift, rest.sum = self.count - some.count, self.shift, self.sum - some.sum
        rest.squares = self.squares - some.squares
        return rest

    @property
    def means(self) -> Float[Tensor, "width"]:
        return self.shift + self.sum / self.count

    @property
    def scatter(self) -> Float[Tensor, "width width"]:
        return self.squares.addr(self.sum, self.sum, alpha=-1 / self.count)

    @property
    def covariance(self) -> Float[Tensor, "width width"]:
        return self.scatter / self.count

    @property
    def variances(self) -> Float[Tensor, "width"]:
        squares = self.squares if self.diagonal else self.squares.diagonal()
        return (squares - self.sum.square() / self.count) / self.count

    @property
    def norms(self) -> Float[Tensor, "width"]:
        """L2 norms of the columns."""
        return (self.count * (self.variances.clamp_min(0) + self.means.square())).sqrt()
