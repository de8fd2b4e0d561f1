"""SlimLLM's own parts (paper section 4), and the plainest part of each kind."""

import torch

from slimllm_nb import channels, heads, ratios, regression
from slimllm_nb.methods.even_groups import select_evenly
from slimllm_nb.methods.registry import register


@register.head_score("pearson")
def pearson(contribution_covariance):
    """Paper eq. 4: minus the similarity of the output without the head."""
    return heads.head_importance(contribution_covariance)


@register.head_selection("greedy")
def greedy(scores, contribution_covariance, num_pruned, key_value_owner, even_groups=False):
    """Paper Algorithm 1, from the guess that any head score gives. even_groups: see methods.even_groups."""
    if even_groups:
        return select_evenly(contribution_covariance, num_pruned, scores, key_value_owner)
    return heads.select_heads(contribution_covariance, num_pruned, importance=scores)


@register.channel_score("feature_space")
def feature_space(mlp_input_norms, input_norms, output_scatter, gate_weight, up_weight, output_weight):
    """Paper eqs. 5-8: direction and magnitude in feature space."""
    return channels.importance_from_statistics(
        mlp_input_norms, input_norms, output_scatter, gate_weight, up_weight, output_weight
    )


@register.channel_selection("keep_lowest")
def keep_lowest(scores, num_pruned, keep_lowest=0.01):
    """The lowest go, but for the very lowest `keep_lowest` of all (the authors' code; not in the paper)."""
    return channels.select_channels(scores, num_pruned, keep_lowest)


@register.head_selection("lowest")
@register.channel_selection("lowest")
def lowest(scores, num_pruned):
    """The lowest scores go."""
    return torch.argsort(scores, stable=True)[num_pruned:].sort().values


@register.allocation("similarity")
def similarity_softmax(similarity, pruning_ratio, pruned_layers, alpha):
    """Paper eq. 11: layers that change their input least give most."""
    return ratios.allocate(similarity, pruning_ratio, pruned_layers, alpha)


@register.allocation("uniform")
def uniform(pruning_ratio, pruned_layers, num_layers):
    """As many parameters as `pruned_layers` layers with `pruning_ratio`, the same share of every layer."""
    return torch.full((num_layers,), pruning_ratio * pruned_layers / num_layers, dtype=torch.float64)


@register.recovery("regression")
def scale_and_shift(moments):
    """Paper eqs. 9-10: a scale and a shift for every output."""
    return regression.fit_moments(moments)


@register.recovery("bias")
def bias(moments):
    """The mean of what is gone, for every output: b = E[X_P] W_P (FLAP, arXiv 2312.11983)."""
    return torch.ones_like(moments.mean_full), moments.mean_full - moments.mean_kept


@register.recovery("none", adds_bias=False)
def none():
    """The weights as they are."""
    return None


register.method(
    "slimllm",
    head_score="pearson",
    head_selection="greedy",
    channel_score="feature_space",
    channel_selection="keep_lowest",
    allocation="similarity",
    recovery="regression",
)
