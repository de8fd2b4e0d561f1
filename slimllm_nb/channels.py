"""Which intermediate channels of the MLP matter: direction and magnitude in feature space (paper section 4.2).

The MLP output Y = A W_down is a sum of rank-one contributions, one for each intermediate channel. A channel matters
when it is active (its norm over tokens) and when its row of W_down points along directions in which Y varies.
Statistics of the tokens are float64: near ties decide which channel goes.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def channel_importance(
    mlp_inputs: Float[Tensor, "tokens hidden"],
    activations: Float[Tensor, "tokens intermediate"],
    gate_weight: Float[Tensor, "intermediate hidden"],
    up_weight: Float[Tensor, "intermediate hidden"],
    down_weight: Float[Tensor, "hidden intermediate"],
) -> Float[Tensor, "intermediate"]:
    """Importance of every intermediate channel, float64. Paper eqs. 5-8.

    `activations` is the input of `down_proj`; the weights are as in `nn.Linear.weight`.
    """
    outputs = activations.double() @ down_weight.double().T  # (tokens, hidden)
    centred = outputs - outputs.mean(0)
    norms = mlp_inputs.double().norm(dim=0), activations.double().norm(dim=0)
    return importance_from_statistics(*norms, centred.T @ centred, gate_weight, up_weight, down_weight)


def importance_from_statistics(
    mlp_input_norms: Float[Tensor, "hidden"],
    activation_norms: Float[Tensor, "intermediate"],
    output_scatter: Float[Tensor, "hidden hidden"],
    gate_weight: Float[Tensor, "intermediate hidden"],
    up_weight: Float[Tensor, "intermediate hidden"],
    down_weight: Float[Tensor, "hidden intermediate"],
) -> Float[Tensor, "intermediate"]:
    """Paper eq. 8 from statistics of the tokens, float64: L2 norms of the columns of X and of A, and (Y - mean)'(Y -
    mean)."""
    magnitude = activation_norms * direction_importance(output_scatter, down_weight)
    return magnitude + gate_and_up_terms(mlp_input_norms, gate_weight, up_weight)


def gate_and_up_terms(
    mlp_input_norms: Float[Tensor, "hidden"],
    gate_weight: Float[Tensor, "intermediate hidden"],
    up_weight: Float[Tensor, "intermediate hidden"],
) -> Float[Tensor, "intermediate"]:
    """The last two terms of paper eq. 8: norms of the rows of W_gate and W_up, weighted by their inputs' norms."""
    weights = map(_at_least_float32, (gate_weight, up_weight))
    return sum((weight * mlp_input_norms.to(weight)).norm(dim=1).double() for weight in weights)


def direction_importance(
    scatter: Float[Tensor, "hidden hidden"], down_weight: Float[Tensor, "hidden intermediate"]
) -> Float[Tensor, "intermediate"]:
    """I^d: length of every channel's row of W_down in the feature space of the MLP output, each direction weighted by
    sigmoid(its variance / mean variance). Paper eqs. 5-7. One half to one times the plain length.

    The scatter matrix is symmetric, so `eigh`: the authors' unsymmetric `eig` can return complex pairs and then fails.
    """
    variances, directions = torch.linalg.eigh(scatter)
    # Rounding can leave a tiny negative variance; an output that never varies has mean 0.
    variances = variances.clamp_min(0)
    weights = torch.sigmoid(variances / variances.mean().clamp_min(torch.finfo(variances.dtype).tiny))
    down = _at_least_float32(down_weight)
    return ((weights * directions).to(down).T @ down).norm(dim=0).double()  # (hidden, intermediate): a row, a direction


def _at_least_float32(weight: Tensor) -> Tensor:
    """In float32 a norm is off by 1e-7, less than the tokens say about it; a float64 product takes twice as long."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def select_channels(
    importance: Float[Tensor, "intermediate"], num_pruned: int, keep_lowest: float = 0.01
) -> Int[Tensor, "kept"]:
    """The channels to keep, sorted, after the `num_pruned` least important ones go.

    keep_lowest: the share of all channels, at the very bottom, that is kept all the same. The authors' code keeps 1 %;
    the paper does not mention it. When both together exceed the number of channels, fewer of the lowest are kept.
    Raises: ValueError unless 0 <= num_pruned < intermediate and 0 <= keep_lowest < 1.
    """
    intermediate = len(importance)
    if not 0 <= num_pruned < intermediate:
        raise ValueError(f"num_pruned is {num_pruned}; allowed: 0 to {intermediate - 1} (a layer keeps a channel)")
    if not 0 <= keep_lowest < 1:
        raise ValueError(f"keep_lowest is {keep_lowest}; allowed: 0 up to, not including, 1")
    num_lowest = min(round(keep_lowest * intermediate), intermediate - num_pruned)
    order = torch.argsort(importance, stable=True)
    return torch.cat([order[:num_lowest], order[num_lowest + num_pruned :]]).sort().values
