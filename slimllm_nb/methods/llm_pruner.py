"""LLM-Pruner (Ma, Fang, Wang; NeurIPS 2023; arXiv 2305.11627): first-order Taylor, element by element.

Its gradients come from the dense model. Without the fine-tuning that its authors add.
"""

import torch

from slimllm_nb.methods.registry import register


@register.head_score("taylor")
def taylor_of_heads(
    query_weight,
    key_weight,
    value_weight,
    output_weight,
    query_gradient,
    key_gradient,
    value_gradient,
    output_gradient,
    key_value_owner,
    head_dim,
):
    """Sum of |gradient * weight| over all weights coupled to a head. A key/value head that several query heads read
    counts for each of them with its share (the paper covers multi-head attention alone)."""

    def by_head(weight, gradient):  # rows are positions within heads
        return (weight.double() * gradient).abs().sum(1).unflatten(0, (-1, head_dim)).sum(1)

    shared = by_head(key_weight, key_gradient) + by_head(value_weight, value_gradient)
    readers = torch.bincount(key_value_owner, minlength=len(shared))
    own = by_head(query_weight, query_gradient) + by_head(output_weight.T, output_gradient.T)
    return own + (shared / readers)[key_value_owner]


@register.channel_score("taylor")
def taylor_of_channels(gate_weight, up_weight, output_weight, gate_gradient, up_gradient, output_gradient):
    """Sum of |gradient * weight| over the channel's rows of W_gate and W_up and its column of W_down."""
    pairs = ((gate_weight, gate_gradient), (up_weight, up_gradient), (output_weight.T, output_gradient.T))
    return sum((weight.double() * gradient).abs().sum(1) for weight, gradient in pairs)


@register.allocation("middle_layers")
def middle_layers(pruning_ratio, pruned_layers, num_layers, spared_first=4 / 32, spared_last=2 / 32):
    """The same share of every layer but the first and last few: LLM-Pruner spares 4 and 2 of LLaMA-7B's 32 layers."""
    ratios = torch.zeros(num_layers, dtype=torch.float64)
    middle = slice(round(spared_first * num_layers), num_layers - round(spared_last * num_layers))
    ratios[middle] = pruning_ratio * pruned_layers / max(len(ratios[middle]), 1)
    return ratios


register.method(
    "llm_pruner",
    head_score="taylor",
    channel_score="taylor",
    head_selection="lowest",
    channel_selection="lowest",
    allocation="middle_layers",
    recovery="none",
)
