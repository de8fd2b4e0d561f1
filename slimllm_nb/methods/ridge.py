"""Ridge recovery, beyond the paper: the weights that are left are fitted anew, and shrunk towards what they were.

The paper's regression gives every output a scale and a shift. Least squares over all kept weights can do more and
overfits a few thousand tokens; shrinking it towards the surviving weights keeps what the tokens do not speak about.
With centred inputs X, G = X'X / tokens, kept columns K and removed ones P, the minimum over W of
||X_K W' - X W_old'||^2 / tokens + t ||W - W_K||^2 is W_K + (W_P G_PK) (G_KK + t I)^-1, with t = penalty * mean(diag
G_KK). Only G is needed, not the activations.
"""

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
    errors = []
    for penalty in penalties:
        weight, bias = fit_ridge(fitted_covariance, fitted_means, output_weight, kept, penalty)
        errors.append(output_error(held_out_covariance, held_out_means, output_weight, kept, weight, bias))
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
    """Weight of the kept columns and bias, float64. Errors: ValueError unless penalty > 0."""
    if not penalty > 0:
        raise ValueError(f"penalty is {penalty}; allowed: above 0 (least squares on few tokens overfits)")
    weight = weight.to(covariance)
    gone = removed(kept, len(covariance))
    g = covariance[kept][:, kept]
    # An input that never varies leaves g all zero: the weights then stay as they are.
    shrink = (penalty * g.diagonal().mean()).clamp_min(torch.finfo(g.dtype).tiny)
    factor = torch.linalg.cholesky(g + shrink * torch.eye(len(g), dtype=g.dtype, device=g.device))
    change = torch.cholesky_solve(covariance[kept][:, gone] @ weight[:, gone].T, factor).T
    new = weight[:, kept] + change
    return new, weight @ means - new @ means[kept]


def output_error(
    covariance: Float[Tensor, "width width"],
    means: Float[Tensor, "width"],
    weight: Float[Tensor, "hidden width"],
    kept: Int[Tensor, "kept"],
    new_weight: Float[Tensor, "hidden kept"],
    bias: Float[Tensor, "hidden"],
) -> Float[Tensor, ""]:
    """Mean over tokens of ||new output - old output||^2, from the inputs' covariance and means."""
    difference = -weight.to(covariance)
    difference[:, kept] += new_weight
    return ((difference @ covariance) * difference).sum() + (difference @ means + bias).square().sum()


def removed(kept: Int[Tensor, "kept"], width: int) -> Int[Tensor, "gone"]:
    """The columns that are not kept."""
    mask = torch.ones(width, dtype=torch.bool, device=kept.device)
    mask[kept] = False
    return mask.nonzero().flatten()


register.method("slimllm_ridge", recovery="ridge")
