"""The channel score of LoRAP (Li, Shi, Zhou, Zhang; ICML 2024; arXiv 2404.09695): a product of norms.

The method of this name is not LoRAP, which compresses attention by low-rank factors: it takes SlimLLM's heads.
"""

from slimllm_nb.channels import gate_and_up_terms
from slimllm_nb.methods.registry import register


@register.channel_score("norm_product")
def norm_product(mlp_input_norms, input_norms, gate_weight, up_weight, output_weight):
    """Norm of the activation times norm of its column of W_down, plus the norms of the rows of W_gate and W_up weighted
    by the norms of their inputs. SlimLLM's eq. 8 without the feature space."""
    through = input_norms * output_weight.to(input_norms).norm(dim=0)
    return through + gate_and_up_terms(mlp_input_norms, gate_weight, up_weight)


register.method("norm_product", channel_score="norm_product", allocation="uniform", recovery="none")
