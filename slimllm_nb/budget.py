"""From ratios to whole heads and channels, and the ratio that leaves a wanted number of parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from slimllm_nb.evaluation import count_parameters

TOLERANCE = 0.003  # a target is met when the share that is left is within 0.3 points of it


@dataclass(frozen=True)
class Widths:
    """Query heads, key/value heads and intermediate channels of one decoder layer."""

    heads: int
    key_value_heads: int
    channels: int


def layer_widths(layer: nn.Module) -> Widths:
    """The widths of a decoder layer as it stands."""
    attention = layer.self_attn
    return Widths(
        heads=attention.q_proj.out_features // attention.head_dim,
        key_value_heads=attention.k_proj.out_features // attention.head_dim,
        channels=layer.mlp.down_proj.in_features,
    )


def removed_counts(widths: Widths, ratio: float) -> tuple[int, int]:
    """How many heads and channels a layer's ratio takes: round(ratio * count), but one of each always stays."""
    heads = min(round(ratio * widths.heads), widths.heads - 1)
    channels = min(round(ratio * widths.channels), widths.channels - 1)
    return heads, channels


def removed_parameters(layer: nn.Module, heads: int, key_value_heads: int, channels: int, shift: bool) -> int:
    """Parameters that leave `layer` with so many heads and channels, less the biases that the shift adds."""
    attention, mlp, hidden = layer.self_attn, layer.mlp, layer.hidden_size
    per_head = attention.head_dim * (2 * hidden + (attention.q_proj.bias is not None))
    per_key_value_head = 2 * attention.head_dim * (hidden + (attention.k_proj.bias is not None))
    per_channel = 3 * hidden + 2 * (mlp.gate_proj.bias is not None)
    added_biases = [heads > 0 and attention.o_proj.bias is None, channels > 0 and mlp.down_proj.bias is None]
    added = hidden * sum(added_biases) if shift else 0
    return heads * per_head + key_value_heads * per_key_value_head + channels * per_channel - added


def find_ratio(
    allocation: Callable[[float], Float[Tensor, "layers"]],
    model: LlamaForCausalLM,
    target: float,
    part: str,
    key_value_losses: Sequence[int],
    shift: bool,
) -> float:
    """The pruning ratio that leaves `target` (a share, 0 to 1) of the parameters of `part`: "model" or "decoder".

    What is left falls as the ratio grows, in steps of whole heads and channels; bisection finds the step nearest to the
    target. `key_value_losses`: key/value heads that each layer is expected to lose at least. With multi-head attention
    they follow from the ratio; with grouped queries it takes a pruning run to know which lose their last query head.
    Errors: ValueError when no ratio comes within 0.3 points; it names the nearest shares on either side.
    """
    if part not in ("model", "decoder"):
        raise ValueError(f"target_of is {part!r}; allowed: 'model', 'decoder'")
    if not 0 < target <= 1:
        raise ValueError(f"target_parameters is {target}; allowed: above 0, up to 1 (all parameters stay)")
    total = count_parameters(model)[part]
    layers = list(model.model.layers)

    def share_left(ratio: float) -> float:
        removed = 0
        for layer, layer_ratio, expected in zip(layers, allocation(ratio).tolist(), key_value_losses, strict=True):
            widths = layer_widths(layer)
            heads, channels = removed_counts(widths, layer_ratio)
            # More key/value heads than query heads cannot be left.
            certain = max(0, widths.key_value_heads - (widths.heads - heads))
            removed += removed_parameters(layer, heads, max(certain, expected), channels, shift)
        return 1 - removed / total

    low, high = 0.0, 1 - 1e-9
    shares = {low: share_left(low), high: share_left(high)}
    for _ in range(50):
        middle = (low + high) / 2
        shares[middle] = share_left(middle)
        low, high = (middle, high) if shares[middle] > target else (low, middle)
    best = min(shares, key=lambda ratio: abs(shares[ratio] - target))
    if abs(shares[best] - target) > TOLERANCE:
        below = max((share for share in shares.values() if share <= target), default=None)
        above = min((share for share in shares.values() if share >= target), default=None)
        nearest = " and ".join(f"{share:.4f}" for share in (below, above) if share is not None)
        raise ValueError(
            f"target_parameters is {target} of the {part}, but no pruning ratio comes within {TOLERANCE} of it: the "
            f"nearest shares are {nearest}. Whole heads go, a layer keeps at least one head and one channel, and only "
            f"pruned_layers layers are pruned: change the target, pruned_layers or alpha"
        )
    return best
