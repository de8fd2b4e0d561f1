"""One decoder layer through a method: attention, then the MLP on the output of the pruned attention (paper section 4).

Each in four steps: the statistics of its calibration tokens, which heads or channels are kept, what makes up for the
others, and on: the hidden states move to what the stored weights give, in every dtype.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from slimllm_nb import regression
from slimllm_nb.llama import PROJECTIONS, key_value_owner, layer_widths
from slimllm_nb.methods import Method, Part
from slimllm_nb.methods.registry import checked_choice, checked_recovery, checked_scores
from slimllm_nb.pruning.budget import channels_for, removed_counts
from slimllm_nb.pruning.slicing import layer_overrides
from slimllm_nb.pruning.statistics import gather, output_moments
from slimllm_nb.pruning.sublayers import Attention, Mlp, Sublayer, require_finite


@dataclass(frozen=True)
class LayerSettings:
    """prune()'s settings as far as a single layer is concerned. gradients: for every layer, what the scores ask for."""

    method: Method
    batch_size: int = 8
    activation_bytes: int | None = None
    seed: int = 0
    gradients: list[dict[str, Tensor]] | None = None


@torch.no_grad()
def prune_layer(
    layer: nn.Module,
    hidden: Float[Tensor, "samples length hidden"] | None,
    context: Callable[[Tensor], dict],
    ratios: tuple[float, float],
    removal: float | None,
    index: int,
    settings: LayerSettings,
) -> tuple[dict, dict[str, Tensor]]:
    """Prune decoder layer `index`. `hidden` is its input, and is overwritten with the output of the pruned layer; None
    where nothing is pruned and no output is needed.

    ratios: of the heads and of the channels. removal: parameters that the layer is to lose, for which the channels
    make up what whole heads leave; None: the ratios alone decide.
    Returns the report's lines, config and number of removed parameters of the layer, and its tensors.
    """
    start, where, method = time.perf_counter(), f"decoder layer {index}", settings.method
    batches, widths = () if hidden is None else hidden.split(settings.batch_size), layer_widths(layer)
    num_heads, num_channels = removed_counts(widths, *ratios)

    attention = Attention(layer, batches, context, where)
    heads, tensors, report = _prune(attention, method.head_score, method.head_selection, num_heads, index, settings)
    del attention  # and what enters o_proj

    if removal is not None:
        gone = _parameters(layer.self_attn.state_dict()) - _parameters(tensors)
        num_channels = channels_for(layer, removal - gone, method.recovery.adds_bias)
    mlp = Mlp(layer, batches, settings.activation_bytes, where)
    channels, mlp_tensors, mlp_report = _prune(
        mlp, method.channel_score, method.channel_selection, num_channels, index, settings
    )

    tensors |= mlp_tensors
    tensors |= {name: one.clone() for name, one in layer.state_dict().items() if "norm" in name.split(".")[0]}
    clipped = round(ratios[0] * widths.heads) > num_heads
    clipped |= removal is None and round(ratios[1] * widths.channels) > num_channels
    key_values, queries = key_value_owner(layer.self_attn)[heads].unique(return_counts=True)
    lines = {"index": index, "ratio": ratios[0], "channel_ratio": ratios[1], "clipped": clipped}
    lines |= {"heads": widths.heads, "channels": widths.channels, "kept_heads": heads.tolist()}
    lines |= {"kept_key_value_heads": key_values.tolist(), "kept_channels": channels.tolist()}
    lines |= report | mlp_report | {"seconds": time.perf_counter() - start}
    overrides = layer_overrides(tensors, layer.self_attn.head_dim, queries.tolist())
    removed = _parameters(layer.state_dict()) - _parameters(tensors)
    return {"report": lines, "overrides": overrides, "removed": removed}, tensors


@torch.no_grad()
def dense_scores(
    settings: LayerSettings,
    layer: nn.Module,
    hidden: Float[Tensor, "samples length hidden"],
    context: Callable[[Tensor], dict],
    index: int,
    batch_size: int,
) -> tuple[None, dict[str, Tensor]]:
    """Head and channel scores of a layer that is not pruned. `hidden` is overwritten with its output."""
    batches, where, method = hidden.split(batch_size), f"decoder layer {index}", settings.method
    heads = _score(Attention(layer, batches, context, where), method.head_score, index, settings)
    mlp = Mlp(layer, batches, settings.activation_bytes, where)
    return None, {"head_scores": heads, "channel_scores": _score(mlp, method.channel_score, index, settings)}


def _score(sublayer: Sublayer, score: Part, index: int, settings: LayerSettings) -> Tensor:
    statistics = gather(sublayer, set(score.needs)) | _constants(sublayer, index, settings)
    found = checked_scores(score, score(statistics), sublayer.count, sublayer.where)
    _move_on(sublayer, None, sublayer.weight, sublayer.projection.bias)
    return found


def _prune(
    sublayer: Sublayer, score: Part, selection: Part, num_pruned: int, index: int, settings: LayerSettings
) -> tuple[Int[Tensor, "kept"], dict[str, Tensor], dict]:
    """What is kept, the new tensors, and the lines of the report."""
    if num_pruned == 0:
        _move_on(sublayer, None, sublayer.weight, bias := sublayer.projection.bias)
        kept = torch.arange(sublayer.count, device=sublayer.weight.device)
        return kept, sublayer.cut(kept, sublayer.weight.clone(), None if bias is None else bias.clone()), {}
    recovery = settings.method.recovery
    parts = [score, selection, recovery] if "scores" in selection.needs else [selection, recovery]
    wanted = {name for part in parts for name in part.needs}
    statistics = gather(sublayer, wanted) | _constants(sublayer, index, settings)
    kept = _choose(sublayer, statistics, score, selection, num_pruned)
    weight, bias, report = _recover(sublayer, statistics, sublayer.columns(kept), recovery)
    _move_on(sublayer, sublayer.columns(kept), weight, bias)
    prefix = "attention" if isinstance(sublayer, Attention) else "mlp"
    return kept, sublayer.cut(kept, weight, bias), {f"{prefix}_{name}": one for name, one in report.items()}


def _constants(sublayer: Sublayer, index: int, settings: LayerSettings) -> dict:
    """What is known before any token is seen."""
    number = (settings.seed * 100_003 + index) * 2 + isinstance(sublayer, Mlp)
    found = {"layer_index": index, "generator": torch.Generator().manual_seed(number)} | sublayer.constants
    gradients = settings.gradients[index] if settings.gradients else {}
    names = {name: f"{sublayer.name}.{projection}.weight" for name, projection in PROJECTIONS[sublayer.name].items()}
    return found | {f"{name}_gradient": gradients[one] for name, one in names.items() if one in gradients}


def _choose(sublayer: Sublayer, statistics: dict, score: Part, selection: Part, num_pruned: int) -> Int[Tensor, "kept"]:
    """The heads or channels to keep. Scores and choices may come from another device than the weights."""
    device, count, statistics["num_pruned"] = sublayer.weight.device, sublayer.count, num_pruned
    if "scores" in selection.needs:
        statistics["scores"] = checked_scores(score, score(statistics), count, sublayer.where).to(device)
    return checked_choice(selection, selection(statistics), count, num_pruned, sublayer.where).to(device)


def _recover(
    sublayer: Sublayer, statistics: dict, columns: Int[Tensor, "columns"], part: Part
) -> tuple[Float[Tensor, "hidden columns"], Float[Tensor, "hidden"] | None, dict]:
    """Weight of the kept columns and bias as they are stored, and the lines of the report (paper section 4.3)."""
    old, bias = sublayer.weight[:, columns], sublayer.projection.bias
    moments = output_moments(sublayer, statistics, columns, None)
    report = {"error_before": regression.relative_error(moments)}
    result = part(statistics | {"kept": columns, "moments": moments})
    if result is None:
        return old, None if bias is None else bias.clone(), report
    first, shift, report["notes"] = checked_recovery(part, result, sublayer.weight, len(columns), sublayer.where)
    if first.ndim == 1:  # a scale and a shift, folded in float64
        weight, report["mean_scale"] = first[:, None] * old.double(), first.mean().item()
        report["error_after"] = regression.relative_error(moments, first, shift)
    else:
        weight, moments = first, output_moments(sublayer, statistics, columns, first)
        report["error_after"] = regression.relative_error(moments, shift=0.0 if shift is None else shift)
    if bias is not None:
        shift = bias.double() if shift is None else shift + bias.double()
    return weight.to(old), None if shift is None else shift.to(old), report


def _move_on(sublayer: Sublayer, columns: Int[Tensor, "columns"] | None, weight: Tensor, bias: Tensor | None) -> None:
    """Add what the pruned sublayer gives to the residual stream, batch by batch."""
    for index, batch in enumerate(sublayer.batches):
        output = functional.linear(sublayer.inputs(index, columns), weight, bias)
        require_finite(output, sublayer.where)
        batch += output.view_as(batch)


def _parameters(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
