"""SlimLLM with a piece taken out or another in its place: what the ablations compare (paper Tables 4 to 6)."""

import torch

from slimllm_nb import ratios
from slimllm_nb.channels import direction_importance, gate_and_up_terms
from slimllm_nb.methods.registry import register


@register.channel_score("direction_only")
def direction_only(output_scatter, output_weight):
    """I^d of paper eq. 7, whatever the activations' norms."""
    return direction_importance(output_scatter, output_weight)


@register.channel_score("activation_norms_only")
def activation_norms_only(input_norms):
    """The norms of the activations of eq. 8, whatever W_down."""
    return input_norms


@register.channel_score("feature_space_without_gate_and_up")
def without_gate_and_up(input_norms, output_scatter, output_weight):
    """The first term of eq. 8."""
    return input_norms * direction_importance(output_scatter, output_weight)


@register.channel_score("gate_and_up_only")
def gate_and_up_only(mlp_input_norms, gate_weight, up_weight):
    """The other terms of eq. 8."""
    return gate_and_up_terms(mlp_input_norms, gate_weight, up_weight)


@register.recovery("scale", adds_bias=False)
def scale(moments, output_weight, kept):
    """A scale for every output and no shift: least squares through the origin."""
    products = moments.cov + moments.mean_kept * moments.mean_full
    squares = moments.var_kept + moments.mean_kept.square()
    factors = torch.where(squares > 0, products / torch.where(squares > 0, squares, 1), 1)
    return factors[:, None] * output_weight[:, kept].double(), None


@register.allocation("similarity_with_alpha")
def similarity_with_alpha(similarity, pruning_ratio, pruned_layers, sharpness=10.0):
    """Paper eq. 11 with an alpha of one's own (Table 5)."""
    return ratios.allocate(similarity, pruning_ratio, pruned_layers, sharpness)
