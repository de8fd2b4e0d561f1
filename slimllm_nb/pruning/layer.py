"""One decoder layer through a method: attention, then the MLP on the output of the pruned attention (paper section 4).

Each in four steps: the statistics of its calibration tokens, which heads or channels are kept, what makes up for the
others, and on: the hidden states move to what the stored weights give, in every dtype.
"""

import time
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from slimllm_nb import regression
from slimllm_nb.checks import require_finite
from slimllm_nb.llama import head_columns, key_value_owner, layer_widths
from slimllm_nb.methods import Part
from slimllm_nb.methods.checked import checked_choice, checked_recovery, checked_scores
from slimllm_nb.pruning.budget import Plan, aligned, channels_for, removed_counts
from slimllm_nb.pruning.slicing import layer_overrides
from slimllm_nb.pruning.statistics import gather, output_moments
from slimllm_nb.pruning.sublayers import Attention, Mlp, Settings, Sublayer


def prune_layer(
    layer: nn.Module,
    batches: tuple[Float[Tensor, "_ length hidden"], ...],
    context: Callable[[Tensor], dict],
    plan: Plan,
    removal: float | None,
    index: int,
    settings: Settings,
) -> tuple[dict, dict[str, Tensor]]:
    """Prune decoder layer `index`. `batches` are its input, and are overwritten with the output of the pruned layer;
    none where nothing is pruned and no output is needed. Gradients are off where it is called.

    plan: its ratios, of the heads and of the channels. removal: parameters that the layer is to lose, for which the
    channels make up what whole heads leave; None: the ratios alone decide.
    Returns the report's lines, config and number of removed parameters of the layer, and its tensors.
    """
    start, method, widths = time.perf_counter(), settings.method, layer_widths(layer)
    ratios = plan.layer_ratios[index].tolist()
    num_heads, num_channels = removed_counts(widths, *ratios)
    clipped = round(ratios[0] * widths.heads) > num_heads
    clipped |= removal is None and round(ratios[1] * widths.channels) > num_channels

    attention = Attention(layer, batches, index, settings, context)
    heads, tensors, report = _prune(attention, method.head_parts, num_heads)
    del attention  # and the input of o_proj

    if removal is not None:
        gone = _parameters(layer.self_attn.state_dict()) - _parameters(tensors)
        num_channels = channels_for(layer, removal - gone, method.recovery.adds_bias)
    num_channels = aligned(widths.channels, num_channels, plan.channel_multiple)
    mlp = Mlp(layer, batches, index, settings)
    channels, mlp_tensors, mlp_report = _prune(mlp, method.channel_parts, num_channels)

    tensors |= mlp_tensors
    tensors |= {name: one.clone() for name, one in layer.state_dict().items() if "norm" in name.split(".")[0]}
    key_values, queries = key_value_owner(layer.self_attn)[heads].unique(return_counts=True)
    lines = {"index": index, "ratio": ratios[0], "channel_ratio": ratios[1], "clipped": clipped}
    lines |= {"heads": widths.heads, "channels": widths.channels, "kept_heads": heads.tolist()}
    lines |= {"kept_key_value_heads": key_values.tolist(), "kept_channels": channels.tolist()}
    lines |= report | mlp_report | {"seconds": time.perf_counter() - start}
    overrides = layer_overrides(tensors, layer.self_attn.head_dim, queries.tolist())
    removed = _parameters(layer.state_dict()) - _parameters(tensors)
    return {"report": lines, "overrides": overrides, "removed": removed}, tensors


def dense_scores(
    settings: Settings,
    layer: nn.Module,
    batches: tuple[Float[Tensor, "_ length hidden"], ...],
    context: Callable[[Tensor], dict],
    index: int,
) -> tuple[None, dict[str, Tensor]]:
    """Head and channel scores of a layer that is not pruned. `batches` are overwritten with its output."""
    found = {}
    for score in (settings.method.head_score, settings.method.channel_score):
        given = layer, batches, index, settings
        sublayer = Attention(*given, context) if score.kind == "head_score" else Mlp(*given)
        found[f"{score.kind}s"] = statistics_for(sublayer, [score])["scores"]
        move_on(sublayer, sublayer.weight, sublayer.projection.bias)
    return None, found


def statistics_for(sublayer: Sublayer, parts: list[Part]) -> dict:
    """What these parts ask for; of a score among them, "scores" as well."""
    statistics = gather(sublayer, {name for part in parts for name in part.needs})
    if parts[0].kind.endswith("_score"):
        scores = checked_scores(parts[0], parts[0](statistics), sublayer.count, sublayer.where)
        statistics["scores"] = scores.to(sublayer.weight.device)
    return statistics


def _prune(
    sublayer: Sublayer, parts: list[Part], num_pruned: int
) -> tuple[Int[Tensor, "kept"], dict[str, Tensor], dict]:
    """What is kept, the new tensors, and the lines of the report."""
    if num_pruned == 0:
        move_on(sublayer, weight := sublayer.weight.clone(), bias := sublayer.projection.bias)
        kept = torch.arange(sublayer.count, device=weight.device)
        return kept, sublayer.cut(kept, weight, None if bias is None else bias.clone()), {}
    *_, selection, recovery = parts
    statistics = statistics_for(sublayer, parts) | {"num_pruned": num_pruned}
    asked = None if selection.options.get("even_groups") else num_pruned
    kept = checked_choice(selection, selection(statistics), sublayer.count, asked, sublayer.where)
    columns = head_columns(kept := kept.to(sublayer.weight.device), sublayer.size)
    weight, bias, report = recover(sublayer, statistics, columns, recovery)
    move_on(sublayer, weight, bias, columns)
    return kept, sublayer.cut(kept, weight, bias), {f"{sublayer.label.lower()}_{k}": one for k, one in report.items()}


def recover(
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
        scale, weight, report["mean_scale"] = first, first[:, None] * old.double(), first.mean().item()
    else:
        scale, weight, moments = 1.0, first, output_moments(sublayer, statistics, columns, first.to(old))
    report["error_after"] = regression.relative_error(moments, scale, 0.0 if shift is None else shift)
    if bias is not None:
        shift = bias.double() if shift is None else shift + bias.double()
    return weight.to(old), None if shift is None else shift.to(old), report


def move_on(sublayer: Sublayer, weight: Tensor, bias: Tensor | None, columns: Tensor | None = None) -> None:
    """Add what the pruned sublayer gives to the residual stream, batch by batch."""
    for index, batch in enumerate(sublayer.batches):
        output = functional.linear(sublayer.inputs(index, columns), weight, bias)
        require_finite(output, sublayer.where)
        batch += output.view_as(batch)


def _parameters(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
