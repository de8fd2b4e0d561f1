"""From ratios to whole heads and channels, and from a wanted number of parameters to a ratio."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from slimllm_nb.evaluation import count_parameters
from slimllm_nb.llama import Widths, layer_widths

TOLERANCE = 0.003  # a target is met when the share that is left is within 0.3 points of it
PARTS = ("model", "decoder")


def of_both_halves(ratios: Float[Tensor, "*layers_and_halves"]) -> Float[Tensor, "layers 2"]:
    """What an allocation gives, one ratio for each layer or (layers, 2), as ratios of the heads and of the channels."""
    return ratios if ratios.ndim == 2 else ratios[:, None].expand(-1, 2)


def removed_counts(widths: Widths, ratio: float, channel_ratio: float | None = None) -> tuple[int, int]:
    """How many heads and channels a layer's ratio takes: round(ratio * count), but one of each always stays.

    channel_ratio: of the channels, where it is another one.
    """
    heads = min(round(ratio * widths.heads), widths.heads - 1)
    channels = min(round((ratio if channel_ratio is None else channel_ratio) * widths.channels), widths.channels - 1)
    return heads, channels


def removed_parameters(layer: nn.Module, heads: int, key_value_heads: int, channels: int, shift: bool) -> int:
    """Parameters that leave `layer` with so many heads and channels, less the biases that the shift adds."""
    attention, hidden = layer.self_attn, layer.hidden_size
    per_head = attention.head_dim * (2 * hidden + (attention.q_proj.bias is not None))
    per_key_value_head = 2 * attention.head_dim * (hidden + (attention.k_proj.bias is not None))
    added = hidden if shift and heads > 0 and attention.o_proj.bias is None else 0
    removed_channels = channels * parameters_per_channel(layer) - (added_bias(layer) if shift and channels > 0 else 0)
    return heads * per_head + key_value_heads * per_key_value_head - added + removed_channels


def parameters_per_channel(layer: nn.Module) -> int:
    """Parameters that one intermediate channel takes along: its rows of gate and up, its column of down."""
    return 3 * layer.hidden_size + 2 * (layer.mlp.gate_proj.bias is not None)


def added_bias(layer: nn.Module) -> int:
    """Parameters that the shift adds to `down_proj`."""
    return layer.hidden_size if layer.mlp.down_proj.bias is None else 0


def channels_for(layer: nn.Module, removal: float, shift: bool) -> int:
    """How many channels must go so that the MLP loses `removal` parameters, as nearly as whole channels allow."""
    per_channel, channels = parameters_per_channel(layer), layer_widths(layer).channels
    bias = added_bias(layer) if shift else 0
    if removal <= (per_channel - bias) / 2:  # one channel would overshoot by more than none falls short
        return 0
    return min(max(round((removal + bias) / per_channel), 1), channels - 1)


@dataclass(frozen=True)
class Plan:
    """A target made into numbers: the ratio that meets it, and how many parameters each layer is to lose."""

    pruning_ratio: float
    removals: list[float]


def plan_target(
    allocation: Callable[[float], Float[Tensor, "*layers_and_halves"]],
    model: LlamaForCausalLM,
    target: float,
    part: str,
    shift: bool,
) -> Plan:
    """The pruning ratio that leaves `target` (a share, 0 to 1) of the parameters of `part`: "model" or "decoder".

    A layer is to lose its ratios' shares of the parameters of its heads and of its channels. Heads are few and come
    whole, and which key/value heads lose their last query head is known only when the heads are chosen; so the walk
    through the decoder takes the heads first, and the channels make up the rest (`channels_for`). What one layer cannot
    give is asked of the next ones. One pruning meets any target within reach.
    Errors: ValueError, see check_target; and when even ratio 1 leaves more than the target.
    """
    total, layers = count_parameters(model)[part], list(model.model.layers)
    widths = [layer_widths(layer) for layer in layers]
    whole = [
        (
            removed_parameters(layer, w.heads, w.key_value_heads, 0, shift=False),
            removed_parameters(layer, 0, 0, w.channels, shift=False),
        )
        for layer, w in zip(layers, widths, strict=True)
    ]
    most = [
        removed_parameters(layer, w.heads - 1, w.key_value_heads - 1, w.channels - 1, shift)
        for layer, w in zip(layers, widths, strict=True)
    ]

    def removals(ratio: float) -> list[float]:
        shares = of_both_halves(allocation(ratio)).tolist()
        return [
            min(heads * of_heads + channels * of_channels, limit)
            for (heads, channels), (of_heads, of_channels), limit in zip(shares, whole, most, strict=True)
        ]

    wanted, low, high = (1 - target) * total, 0.0, 1 - 1e-9
    if sum(removals(high)) < wanted - TOLERANCE * total:
        raise ValueError(
            f"target_parameters is {target} of the {part}, but at least {1 - sum(removals(high)) / total:.4f} of it "
            "stay: only pruned_layers layers are pruned, and each keeps one head and one channel: change the target, "
            "pruned_layers or alpha"
        )
    # What is removed grows with the ratio; where an allocation gives whole heads and channels, in small steps, which
    # the channels make up.
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(removals(middle)) < wanted else (low, middle)
    ratio = 0.0 if target == 1 else high
    return Plan(ratio, removals(ratio))


def check_target(target: float, part: str) -> None:
    """Errors: ValueError for a share that is not above 0 and up to 1, and an unknown part."""
    if part not in PARTS:
        raise ValueError(f"target_of is {part!r}; allowed: {', '.join(map(repr, PARTS))}")
    if not 0 < target <= 1:
        raise ValueError(f"target_parameters is {target}; allowed: above 0, up to 1 (all parameters stay)")


def check_met(target: float, part: str, left: float) -> None:
    """Errors: ValueError when the share that is left is not within TOLERANCE of the target."""
    if abs(left - target) > TOLERANCE:
        raise ValueError(
            f"target_parameters is {target} of the {part}, but {left:.4f} are left, which is not within {TOLERANCE}: "
            "whole heads go, and the last pruned layers had too few channels to make up for them: change the target, "
            "pruned_layers or alpha"
        )
