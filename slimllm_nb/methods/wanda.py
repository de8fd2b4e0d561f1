"""Wanda (Sun, Liu, Bair, Kolter; ICLR 2024; arXiv 2306.11695) for whole heads and channels, as the FLAP paper
(arXiv 2312.11983) and its code compare with it under the name Wanda-sp."""

from slimllm_nb.methods.registry import register


@register.channel_score("wanda_sp")
def wanda_channels(input_norms, output_weight):
    """Sum over the column of W_down of |weight| * L2 norm of the activation."""
    return (output_weight.to(input_norms).abs() * input_norms).sum(0)


@register.head_score("wanda_sp")
def wanda_heads(input_norms, output_weight, head_dim):
    """The same for every column of W_O, summed over the head."""
    return wanda_channels(input_norms, output_weight).unflatten(0, (-1, head_dim)).sum(1)


register.method(
    "wanda_sp",
    head_score="wanda_sp",
    channel_score="wanda_sp",
    head_selection="lowest",
    channel_selection="lowest",
    allocation="uniform",
    recovery="none",
)
