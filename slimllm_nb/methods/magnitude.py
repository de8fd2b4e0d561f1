"""Scores that look at no activation: chance, and the size of the weights."""

import torch
from einops import rearrange

from slimllm_nb.methods.registry import register


@register.head_score("random")
def random_heads(generator, output_weight, head_dim):
    """Uniform between 0 and 1: what any score has to beat."""
    return torch.rand(output_weight.shape[1] // head_dim, generator=generator, dtype=torch.float64)


@register.channel_score("random")
def random_channels(generator, output_weight):
    """Uniform between 0 and 1."""
    return torch.rand(output_weight.shape[1], generator=generator, dtype=torch.float64)


@register.head_score("magnitude")
def head_magnitude(query_weight, output_weight, head_dim):
    """L2 norm of the head's rows of W_Q and columns of W_O. Keys and values may be shared with other heads."""
    query = rearrange(query_weight.double(), "(heads head_dim) hidden -> heads (head_dim hidden)", head_dim=head_dim)
    output = rearrange(output_weight.double(), "hidden (heads head_dim) -> heads (head_dim hidden)", head_dim=head_dim)
    return torch.cat([query, output], dim=1).norm(dim=1)


@register.channel_score("magnitude")
def channel_magnitude(gate_weight, up_weight, output_weight):
    """L2 norm of the channel's rows of W_gate and W_up and column of W_down."""
    return torch.cat([gate_weight.double(), up_weight.double(), output_weight.double().T], dim=1).norm(dim=1)


PLAIN = {"head_selection": "lowest", "channel_selection": "lowest", "allocation": "uniform", "recovery": "none"}
register.method("random", head_score="random", channel_score="random", **PLAIN)
register.method("magnitude", head_score="magnitude", channel_score="magnitude", **PLAIN)
