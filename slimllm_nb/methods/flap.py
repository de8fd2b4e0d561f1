"""FLAP (An, Zhao, Yu, Tang, Wang; AAAI 2024; arXiv 2312.11983): what fluctuates matters; one threshold for the model.

Differs from the authors' code: it standardises columns before it averages them into heads and squares the heads' metric
once more, which the paper does not say; it takes all statistics from the dense model, where here the allocation alone
does and the choice is made on what the pruned layers before leave.
"""

import torch

from slimllm_nb.methods.registry import register


@register.channel_score("flap")
def fluctuation_of_channels(input_variances, output_weight):
    """Variance of the activation over tokens times the squared norm of its column of W_down (the metric WIFV)."""
    return input_variances * output_weight.to(input_variances).square().sum(0)


@register.head_score("flap")
def fluctuation_of_heads(input_variances, output_weight, head_dim):
    """The same for every column of W_O, summed over the head."""
    return fluctuation_of_channels(input_variances, output_weight).unflatten(0, (-1, head_dim)).sum(1)


@register.allocation("flap")
def global_threshold(
    head_scores, channel_scores, head_parameters, channel_parameters, pruning_ratio, pruned_layers, num_layers
):
    """Scores standardised in each layer and half, then one threshold for all of them: the lowest go until the share
    pruning_ratio * pruned_layers / num_layers of the parameters is gone."""
    scores = [(one - one.mean()) / one.std() for one in (*head_scores, *channel_scores)]
    counts = torch.tensor([len(one) for one in scores])
    sizes = torch.repeat_interleave(torch.cat([head_parameters, channel_parameters]), counts)
    group = torch.repeat_interleave(torch.arange(len(scores)), counts)
    order = torch.cat([one.cpu() for one in scores]).argsort(stable=True)
    gone = sizes[order].cumsum(0) <= pruning_ratio * pruned_layers / num_layers * sizes.sum()
    removed = torch.bincount(group[order[gone]], minlength=len(scores))
    return (removed / counts).view(2, num_layers).T


register.method(
    "flap",
    head_score="flap",
    channel_score="flap",
    head_selection="lowest",
    channel_selection="lowest",
    allocation="flap",
    recovery="bias",
)
