"""How much is pruned: from ratios to whole heads and channels, and from a wanted number of parameters to a ratio."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass

import torch
from jaxtyping import Float
from scipy import optimize
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from slimllm_nb import ratios
from slimllm_nb.evaluation import count_parameters
from slimllm_nb.llama import Widths, layer_widths
from slimllm_nb.methods import Method
from slimllm_nb.methods.checked import checked_allocation

TOLERANCE = 0.003  # a target is met when the share that is left is within 0.3 points of it
HIGHEST = 1 - 1e-9  # ratio


@dataclass(frozen=True)
class Plan:
    """The pruning ratio, the ratios of every layer's heads and channels, how many parameters each layer is to lose
    (None: the ratios alone decide), and what the number of channels that a pruned layer keeps is a multiple of."""

    pruning_ratio: float
    layer_ratios: Float[Tensor, "layers 2"]
    removals: Float[Tensor, "layers"] | None = None
    channel_multiple: int = 1


@dataclass(frozen=True)
class PruningTarget:
    """prune()'s settings of how much is pruned: either a ratio or a number of parameters."""

    pruning_ratio: float | None
    target_parameters: float | None
    target_of: str
    pruned_layers: int
    alpha: float
    channel_multiple: int = 1

    def check(self, model: LlamaForCausalLM) -> None:
        """Raises: ValueError naming the setting that is out of range."""
        ratio, target = self.pruning_ratio, self.target_parameters
        if (ratio is None) == (target is None):
            raise ValueError(f"pruning_ratio is {ratio} and target_parameters is {target}: give exactly one of them")
        if self.target_of not in ("model", "decoder"):
            raise ValueError(f"target_of is {self.target_of!r}; allowed: 'model', 'decoder'")
        if target is not None and not 0 < target <= 1:
            raise ValueError(f"target_parameters is {target}; allowed: above 0, up to 1 (all parameters stay)")
        most = min(layer_widths(layer).channels for layer in model.model.layers)
        if not 1 <= self.channel_multiple <= most:
            raise ValueError(f"channel_multiple is {self.channel_multiple}; allowed: 1 to {most}, a layer's channels")
        ratios.allocate(torch.zeros(len(model.model.layers)), ratio or 0.0, self.pruned_layers, self.alpha)

    def plan(self, method: Method, model: LlamaForCausalLM, known: Mapping) -> Plan:
        """What every layer is to lose. known: what the method's allocation may ask for and depends on the samples.

        With a number of parameters as the target, a layer is to lose its ratios' shares of the parameters of its heads
        and of its channels. Heads are few and come whole, and which key/value heads lose their last query head is known
        only when the heads are chosen; so the heads are pruned first, and the channels make up the rest
        (`channels_for`). What one layer cannot give is asked of the next ones: one pruning meets any target in reach.
        Raises: PartError unless the allocation gives a ratio, or two, for every layer, finite and not negative;
        ValueError when even ratio 1 leaves more than the target.
        """
        layers, known = model.model.layers, {"pruned_layers": self.pruned_layers, "alpha": self.alpha, **known}
        widths = torch.tensor([astuple(layer_widths(layer)) for layer in layers], dtype=torch.float64)
        units = torch.tensor([unit_parameters(layer) for layer in layers], dtype=torch.float64)
        (heads, key_value_heads, channels), (query, key_value, channel) = widths.T, units.T
        known |= {"head_parameters": query + key_value * key_value_heads / heads, "channel_parameters": channel}
        known["num_layers"] = len(layers)

        def allocation(ratio: float) -> Float[Tensor, "layers 2"]:
            found = method.allocation(known | {"pruning_ratio": ratio})
            return checked_allocation(method.allocation, found, len(layers))

        if self.target_parameters is None:
            return Plan(self.pruning_ratio, allocation(self.pruning_ratio), None, self.channel_multiple)
        removable = torch.stack([heads * query + key_value_heads * key_value, channels * channel], 1)
        outputs = [(layer.self_attn.o_proj, layer.mlp.down_proj) for layer in layers]
        biases = torch.tensor([sum(one.out_features for one in two if one.bias is None) for two in outputs])
        # One head, as many channels as have to stay, new biases.
        stays = query + key_value + self.channel_multiple * channel + method.recovery.adds_bias * biases
        most = removable.sum(1) - stays
        total, target = count_parameters(model)[self.target_of], self.target_parameters

        def removals(ratio: float) -> Float[Tensor, "layers"]:
            return (allocation(ratio) * removable).sum(1).minimum(most)

        def surplus(ratio: float) -> float:
            return removals(ratio).sum().item() - (1 - target) * total

        if (most_of_all := surplus(HIGHEST)) < -TOLERANCE * total:
            raise ValueError(
                f"target_parameters is {target} of the {self.target_of}, but at least "
                f"{target - most_of_all / total:.4f} of it stay: only pruned_layers layers are pruned, and each keeps "
                "one head and channel_multiple channels: change the target, pruned_layers or alpha"
            )
        # What is removed grows with the ratio; where an allocation gives whole heads and channels, in small steps,
        # which the channels make up.
        ratio = HIGHEST if most_of_all < 0 else optimize.bisect(surplus, 0.0, HIGHEST, xtol=1e-15)
        return Plan(ratio, allocation(ratio), removals(ratio), self.channel_multiple)


def unit_parameters(layer: nn.Module) -> tuple[int, int, int]:
    """Parameters that a query head, a key/value head and an intermediate channel take along."""
    attention, mlp, widths = layer.self_attn, layer.mlp, layer_widths(layer)

    def size(*modules: nn.Module) -> int:
        return sum(one.numel() for module in modules for one in module.parameters())

    query = (size(attention.q_proj) + attention.o_proj.weight.numel()) // widths.heads
    channel = (size(mlp.gate_proj, mlp.up_proj) + mlp.down_proj.weight.numel()) // widths.channels
    return query, size(attention.k_proj, attention.v_proj) // widths.key_value_heads, channel


def removed_counts(widths: Widths, ratio: float, channel_ratio: float | None = None) -> tuple[int, int]:
    """How many heads and channels a layer's ratio (or its channels' own) takes: round(ratio * count), but one stays."""
    pairs = (ratio, widths.heads), (ratio if channel_ratio is None else channel_ratio, widths.channels)
    return tuple(min(round(ratio * count), count - 1) for ratio, count in pairs)


def aligned(channels: int, removed: int, multiple: int) -> int:
    """How many channels go instead of `removed`, so that a multiple is kept: the nearest, but not none of them. Where
    none are to go, all stay."""
    if removed == 0:
        return 0
    kept = round((channels - removed) / multiple)
    return channels - min(max(kept, 1), channels // multiple) * multiple


def channels_for(layer: nn.Module, removal: float, adds_bias: bool) -> int:
    """How many channels are pruned so that the MLP loses `removal` parameters, as nearly as whole channels allow."""
    *_, channel = unit_parameters(layer)
    bias = layer.hidden_size if adds_bias and layer.mlp.down_proj.bias is None else 0
    if removal <= (channel - bias) / 2:  # one channel would overshoot by more than none falls short
        return 0
    return min(max(round((removal + bias) / channel), 1), layer_widths(layer).channels - 1)


def check_met(target: PruningTarget, left: Mapping[str, float]) -> None:
    """Raises: ValueError when the share that is left is not within TOLERANCE of the target, where there is one."""
    asked, left = target.target_parameters, left[target.target_of]
    if asked is not None and abs(left - asked) > TOLERANCE:
        raise ValueError(
            f"target_parameters is {asked} of the {target.target_of}, but {left:.4f} are left, not within {TOLERANCE}: "
            f"channels of the last pruned layers (kept in multiples of {target.channel_multiple}) could not make up "
            "for whole heads: change the target, pruned_layers, alpha or channel_multiple"
        )
