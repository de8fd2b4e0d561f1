"""Ridge recovery, beyond the paper: the weights that are left are fitted anew, and shrunk towards what they were.

The paper's regression gives every output a scale and a shift. Least squares over all kept weights can do more and
overfits a few thousand tokens; shrinking it towards the surviving weights keeps what the tokens do not speak about.
With centred inputs X, G = X'X / tokens, kept columns K and removed ones P, the minimum over W of
||X_K W' - X W_old'||^2 / tokens + t ||W - W_K||^2 is W_K + (W_P G_PK) (G_KK + t I)^-1, with t = penalty * mean(diag
G_KK). Only G is needed, not the activations.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slimllm_nb.methods.registry import register

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0)


@register.recovery("ridge")
def ridge(
    input_covariance,
    input_means,
    fitted_covariance,
    fitted_means,
    held_out_covariance,
    held_out_means,
    output_weight,
    kept,
    penalties=PENALTIES,
):
    """The penalty with the smallest error on held-out calibration samples, fitted on all of them."""
    weight, gone = output_weight.to(input_covariance), other_columns(kept, output_weight.shape[1])
    fitted, held_out = (
        Normal.of(covariance, weight, kept, gone) for covariance in (fitted_covariance, held_out_covariance)
    )
    errors = []
    for penalty in penalties:
        change = fitted.change(penalty)
        # What the new output is off by, on average over the held-out tokens; its bias is the fitted samples'.
        means = held_out_means - fitted_means
        off = change @ means[kept] - weight[:, gone] @ means[gone]
        errors.append(held_out.error(change) + off.square().sum())
    best = penalties[int(torch.stack(errors).argmin())]
    return *fit_ridge(input_covariance, input_means, output_weight, kept, best), {"penalty": best}


@register.recovery("ridge_fixed")
def ridge_fixed(input_covariance, input_means, output_weight, kept, penalty=0.1):
    """The same with a penalty of one's own."""
    return fit_ridge(input_covariance, input_means, output_weight, kept, penalty)


def fit_ridge(
    covariance: Float[Tensor, "width width"],
    means: Float[Tensor, "width"],
    weight: Float[Tensor, "hidden width"],
    kept: Int[Tensor, "kept"],
    penalty: float,
) -> tuple[Float[Tensor, "hidden kept"], Float[Tensor, "hidden"]]:
    """Weight of the kept columns and bias, float64. Raises: ValueError unless penalty > 0."""
    weight = weight.to(covariance)
    gone = other_columns(kept, len(covariance))
    new = weight[:, kept] + Normal.of(covariance, weight, kept, gone).change(penalty)
    return new, weight @ means - new @ means[kept]


def other_columns(columns: Int[Tensor, "some"], width: int) -> Int[Tensor, "others"]:
    """Those of `width` columns that are not among these, sorted."""
    others = torch.ones(width, dtype=torch.bool, device=columns.device)
    others[columns] = False
    return others.nonzero().flatten()


@dataclass(frozen=True)
class Normal:
    """The normal equations: what the penalties share."""

    kept: Float[Tensor, "kept kept"]  # G_KK
    cross: Float[Tensor, "kept hidden"]  # G_KP W_P'

    @classmethod
    def of(cls, covariance: Tensor, weight: Tensor, kept: Tensor, gone: Tensor) -> "Normal":
        rows = covariance[kept]
        return cls(rows[:, kept], rows[:, gone] @ weight[:, gone].T)

    def change(self, penalty: float) -> Float[Tensor, "hidden kept"]:
        """Of the kept columns' weights. Raises: ValueError unless penalty > 0."""
        if not penalty > 0:
            raise ValueError(f"penalty is {penalty}; allowed: above 0 (least squares on few tokens overfits)")
        # An input that never varies leaves G all zero: the weights then stay as they are.
        shrink = (penalty * self.kept.diagonal().mean()).clamp_min(torch.finfo(self.kept.dtype).tiny)
        damped = self.kept.clone()
        damped.diagonal().add_(shrink)
        return torch.cholesky_solve(self.cross, torch.linalg.cholesky(damped)).T

    def error(self, change: Float[Tensor, "hidden kept"]) -> Float[Tensor, ""]:
        """Variance of what the output is off by, added up over the outputs, less what no change can alter."""
        return ((change @ self.kept) * change).sum() - 2 * (change.T * self.cross).sum()


register.method("slimllm_ridge", recovery="ridge")
