"""Linear regression recovery: a scale and a shift for every output of a pruned projection (paper section 4.3).

After heads or channels are gone, output j is x_j where it was y_j. Least squares over tokens gives y_j = scale_j x_j +
shift_j (eqs. 9-10). Both fold into the projection: row j of its weight is multiplied by scale_j, shift_j is its bias.
Least squares needs means, variances and one covariance per output, so those are gathered (float64), not the outputs.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """First and second moments over tokens of kept output x and full output y, per output dimension; float64."""

    mean_kept: Float[Tensor, "hidden"]
    mean_full: Float[Tensor, "hidden"]
    var_kept: Float[Tensor, "hidden"]
    var_full: Float[Tensor, "hidden"]
    cov: Float[Tensor, "hidden"]


def moments(batches: Iterable[tuple[Float[Tensor, "tokens hidden"], Float[Tensor, "tokens hidden"]]]) -> Moments:
    """Moments of two outputs, kept and full, of the same tokens, batch by batch; population variances (divided by the
    number of tokens). Summed around the first batch's means: a naive sum of squares would lose the variance of an
    output whose mean is large."""
    count, centres, sums = 0, None, 0.0
    for batch in batches:
        kept, full = (one.double() for one in batch)
        centres = centres or (kept.mean(0), full.mean(0))
        kept, full = kept - centres[0], full - centres[1]
        products = [torch.linalg.vecdot(*two, dim=0) for two in ((kept, kept), (full, full), (kept, full))]
        sums = sums + torch.stack([kept.sum(0), full.sum(0), *products])
        count += len(kept)
    k, f, kk, ff, kf = sums / count
    return Moments(centres[0] + k, centres[1] + f, kk - k * k, ff - f * f, kf - k * f)


def fit(
    kept_output: Float[Tensor, "tokens hidden"], full_output: Float[Tensor, "tokens hidden"]
) -> tuple[Float[Tensor, "hidden"], Float[Tensor, "hidden"]]:
    """Scale and shift, float64, so that scale * kept_output + shift is closest to full_output. Paper eqs. 9-10."""
    return fit_moments(moments([(kept_output, full_output)]))


def variance_floor(var_full: Float[Tensor, "*outputs"]) -> Float[Tensor, ""]:
    """What does not exceed it does not vary: 1e-12 of the largest output's variance is a sum that cancelled."""
    return 1e-12 * var_full.amax().clamp_min(torch.finfo(var_full.dtype).tiny)


def fit_moments(m: Moments) -> tuple[Float[Tensor, "hidden"], Float[Tensor, "hidden"]]:
    """The same from moments: scale = cov / var, shift = mean_full - scale * mean_kept; scale 1 if x is constant."""
    # A variance far below the square of the mean is what rounding leaves of a constant.
    varies = (m.var_kept > variance_floor(m.var_full)) & (m.var_kept > 1e-14 * m.mean_kept.square())
    scale = torch.where(varies, m.cov / torch.where(varies, m.var_kept, 1), 1)
    return scale, m.mean_full - scale * m.mean_kept


def relative_error(
    m: Moments, scale: Float[Tensor, "hidden"] | float = 1.0, shift: Float[Tensor, "hidden"] | float = 0.0
) -> float:
    """||scale * x + shift - y|| / ||y|| over all tokens and outputs (Frobenius norms); 0 when y is all zero and met."""
    bias = scale * m.mean_kept + shift - m.mean_full
    residual = scale**2 * m.var_kept - 2 * scale * m.cov + m.var_full + bias.square()
    energy = (m.var_full + m.mean_full.square()).sum()
    # Rounding can leave a tiny negative sum where x equals y.
    return (residual.sum().clamp_min(0) / energy.clamp_min(torch.finfo(energy.dtype).tiny)).sqrt().item()
