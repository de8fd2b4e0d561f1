"""How much is pruned: from ratios to whole heads and channels, and from a wanted number of parameters to a ratio."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from slimllm_nb import ratios
from slimllm_nb.evaluation import count_parameters
from slimllm_nb.llama import Widths, layer_widths
from slimllm_nb.methods import Method, Part, PartError

TOLERANCE = 0.003  # a target is met when the share that is left is within 0.3 points of it
PARTS = ("model", "decoder")


@dataclass(frozen=True)
class Plan:
    """The pruning ratio, the ratios of every layer's heads and channels, and how many parameters each layer is to lose
    (None: the ratios alone decide)."""

    pruning_ratio: float
    layer_ratios: Float[Tensor, "layers 2"]
    removals: list[float] | None


@dataclass(frozen=True)
class PruningTarget:
    """prune()'s settings of how much is pruned: either a ratio or a number of parameters."""

    pruning_ratio: float | None
    target_parameters: float | None
    target_of: str
    pruned_layers: int
    alpha: float

    def check(self, model: LlamaForCausalLM) -> None:
        """Raises: ValueError naming the setting that is out of range."""
        if (self.pruning_ratio is None) == (self.target_parameters is None):
            raise ValueError(
                f"pruning_ratio is {self.pruning_ratio} and target_parameters is {self.target_parameters}: "
                "give exactly one of them"
            )
        if self.target_parameters is not None:
            check_target(self.target_parameters, self.target_of)
        nothing = torch.zeros(len(model.model.layers))
        ratios.allocate(nothing, self.pruning_ratio or 0.0, self.pruned_layers, self.alpha)  # checks them

    def plan(self, method: Method, model: LlamaForCausalLM, known: Mapping) -> Plan:
        """What every layer is to lose. known: what the method's allocation may ask for and depends on the samples.

        Raises: PartError for what an allocation may not return; ValueError for a target out of reach.
        """
        known = {"pruned_layers": self.pruned_layers, "alpha": self.alpha, **_sizes(model), **known}

        def allocation(ratio: float) -> Float[Tensor, "layers 2"]:
            return layer_ratios(method.allocation, known, ratio)

        if self.target_parameters is None:
            return Plan(self.pruning_ratio, allocation(self.pruning_ratio), None)
        return plan_target(allocation, model, self.target_parameters, self.target_of, method.recovery.adds_bias)


def layer_ratios(part: Part, known: Mapping, pruning_ratio: float) -> Float[Tensor, "layers 2"]:
    """What an allocation makes of a pruning ratio.

    Raises: PartError unless it gives a ratio, or two, for every layer, finite and not negative.
    """
    found, layers = part(known | {"pruning_ratio": pruning_ratio}), known["num_layers"]
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape not in ((layers,), (layers, 2)):
        raise PartError(f"{part} returned {shape}; allowed: ({layers},), or ({layers}, 2) for heads, channels")
    if not torch.isfinite(found).all() or (found < 0).any():
        raise PartError(f"{part} returned {found.tolist()}; allowed: finite ratios, not negative")
    return expand_ratios(found.double().cpu())


def expand_ratios(found: Float[Tensor, "*layers_and_two"]) -> Float[Tensor, "layers 2"]:
    """One ratio for each layer as ratios of its heads and of its channels; (layers, 2) as it is."""
    return found if found.ndim == 2 else found[:, None].expand(-1, 2)


def _sizes(model: LlamaForCausalLM) -> dict:
    """Parameters that one head takes along, key/value heads shared out, and one channel, layer by layer."""
    layers = [(layer_widths(layer), *_parameters_per_unit(layer)) for layer in model.model.layers]
    heads = [query + key_value * width.key_value_heads / width.heads for width, query, key_value, _ in layers]
    return {
        "num_layers": len(layers),
        "head_parameters": torch.tensor(heads, dtype=torch.float64),
        "channel_parameters": torch.tensor([channel for *_, channel in layers], dtype=torch.float64),
    }


def _parameters_per_unit(layer: nn.Module) -> tuple[int, int, int]:
    """Parameters that a query head, a key/value head and an intermediate channel take along."""
    attention, mlp, widths = layer.self_attn, layer.mlp, layer_widths(layer)

    def size(*modules: nn.Module) -> int:
        return sum(one.numel() for module in modules for one in module.parameters())

    query = (size(attention.q_proj) + attention.o_proj.weight.numel()) // widths.heads
    channel = (size(mlp.gate_proj, mlp.up_proj) + mlp.down_proj.weight.numel()) // widths.channels
    return query, size(attention.k_proj, attention.v_proj) // widths.key_value_heads, channel


def removed_counts(widths: Widths, ratio: float, channel_ratio: float | None = None) -> tuple[int, int]:
    """How many heads and channels a layer's ratio takes: round(ratio * count), but one of each is always kept.

    channel_ratio: of the channels, where it is another one.
    """
    heads = min(round(ratio * widths.heads), widths.heads - 1)
    channels = min(round((ratio if channel_ratio is None else channel_ratio) * widths.channels), widths.channels - 1)
    return heads, channels


def removed_parameters(layer: nn.Module, heads: int, key_value_heads: int, channels: int, shift: bool) -> int:
    """Parameters that `layer` loses with so many heads and channels, less the biases that the shift adds."""
    query, key_value, channel = _parameters_per_unit(layer)
    added = sum(
        layer.hidden_size
        for number, projection in ((heads, layer.self_attn.o_proj), (channels, layer.mlp.down_proj))
        if shift and number > 0 and projection.bias is None
    )
    return heads * query + key_value_heads * key_value + channels * channel - added


def channels_for(layer: nn.Module, removal: float, shift: bool) -> int:
    """How many channels are pruned so that the MLP loses `removal` parameters, as nearly as whole channels allow."""
    per_channel, channels = _parameters_per_unit(layer)[2], layer_widths(layer).channels
    bias = layer.hidden_size if shift and layer.mlp.down_proj.bias is None else 0
    if removal <= (per_channel - bias) / 2:  # one channel would overshoot by more than none falls short
        return 0
    return min(max(round((removal + bias) / per_channel), 1), channels - 1)


def plan_target(
    allocation: Callable[[float], Float[Tensor, "*layers_and_two"]],
    model: LlamaForCausalLM,
    target: float,
    part: str,
    shift: bool,
) -> Plan:
    """The plan that leaves `target` (a share, 0 to 1) of the parameters of `part`: "model" or "decoder".

    A layer is to lose its ratios' shares of the parameters of its heads and of its channels. Heads are few and come
    whole, and which key/value heads lose their last query head is known only when the heads are chosen; so the heads
    are pruned first, and the channels make up the rest (`channels_for`). What one layer cannot give is asked of the
    next ones. One pruning meets any target within reach.
    Raises: ValueError, see check_target; and when even ratio 1 leaves more than the target.
    """
    total, removable, most = count_parameters(model)[part], [], []
    for layer in model.model.layers:
        w = layer_widths(layer)
        of_heads = removed_parameters(layer, w.heads, w.key_value_heads, 0, shift=False)
        removable.append((of_heads, removed_parameters(layer, 0, 0, w.channels, shift=False)))
        most.append(removed_parameters(layer, w.heads - 1, w.key_value_heads - 1, w.channels - 1, shift))

    def removals(ratio: float) -> list[float]:
        shares = expand_ratios(allocation(ratio)).tolist()
        return [min(a * x + b * y, limit) for (a, b), (x, y), limit in zip(shares, removable, most, strict=True)]

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
    return Plan(ratio, expand_ratios(allocation(ratio)), removals(ratio))


def check_target(target: float, part: str) -> None:
    """Raises: ValueError for a share that is not above 0 and up to 1, and an unknown part."""
    if part not in PARTS:
        raise ValueError(f"target_of is {part!r}; allowed: {', '.join(map(repr, PARTS))}")
    if not 0 < target <= 1:
        raise ValueError(f"target_parameters is {target}; allowed: above 0, up to 1 (all parameters stay)")


def check_met(target: float, part: str, left: float) -> None:
    """Raises: ValueError when the share that is left is not within TOLERANCE of the target."""
    if abs(left - target) > TOLERANCE:
        raise ValueError(
            f"target_parameters is {target} of the {part}, but {left:.4f} are left, which is not within {TOLERANCE}: "
            "whole heads go, and the last pruned layers had too few channels to make up for them: change the target, "
            "pruned_layers or alpha"
        )
