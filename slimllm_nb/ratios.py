"""How much of each decoder layer goes: layers that change their input least give most (paper section 4.4)."""

import torch
from jaxtyping import Float
from torch import Tensor


def layer_similarity(
    layer_inputs: Float[Tensor, "tokens hidden"], layer_outputs: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, ""]:
    """Mean over tokens of the cosine similarity between a decoder layer's input and output; float64, -1 to 1.

    A token whose input or output is all zero counts as 0.
    """
    x, y, dot = layer_inputs.double(), layer_outputs.double(), torch.linalg.vecdot
    return (dot(x, y) / (dot(x, x) * dot(y, y)).sqrt().clamp_min(1e-300)).mean()


def allocate(
    similarity: Float[Tensor, "layers"], pruning_ratio: float, pruned_layers: int, alpha: float
) -> Float[Tensor, "layers"]:
    """The pruning ratio of every layer. Paper eq. 11, as in the authors' code; float64.

    The `pruned_layers` layers with the highest similarity share pruning_ratio * pruned_layers by a softmax of
    alpha * similarity, so that their mean ratio is `pruning_ratio`; the others get 0. alpha 0 is uniform. A ratio may
    exceed 1 when alpha is large: who prunes clips it (and says so).

    **Differs:** the paper skips the first and the last layer by name; in the code, nothing but their low similarity
    singles them out.
    Raises: ValueError unless 0 <= pruning_ratio < 1, 0 <= pruned_layers <= layers, alpha and similarity are finite.
    """
    layers = len(similarity)
    if not 0 <= pruning_ratio < 1:
        raise ValueError(f"pruning_ratio is {pruning_ratio}; allowed: 0 (nothing goes) up to, not including, 1")
    if not 0 <= pruned_layers <= layers:
        raise ValueError(f"pruned_layers is {pruned_layers}; allowed: 0 to {layers}, the model's decoder layers")
    if not abs(alpha) < float("inf"):
        raise ValueError(f"alpha is {alpha}; allowed: a finite number")
    if not torch.isfinite(similarity).all():
        raise ValueError(f"similarity is not finite: {similarity.tolist()}")
    similarity = similarity.double()
    chosen = torch.argsort(similarity, descending=True, stable=True)[:pruned_layers]
    ratios = torch.zeros_like(similarity)
    ratios[chosen] = pruning_ratio * pruned_layers * torch.softmax(alpha * similarity[chosen], dim=0)
    return ratios
