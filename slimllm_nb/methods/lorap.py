"""The channel score of LoRAP (Li, Shi, Zhou, Zhang; ICML 2024; arXiv 2404.09695).

LoRAP itself compresses attention by low-rank factors, which is no pruning of heads: SlimLLM's heads stand in for it.
"""

from slimllm_nb.channels import gate_and_up_terms
from slimllm_nb.methods.registry import register


@register.channel_score("lorap")
def input_times_weight(mlp_input_norms, input_norms, gate_weight, up_weight, output_weight):
    """Norm of the activation times norm of its column of W_down, plus the norms of the rows of W_gate and W_up weighted
    by the norms of their inputs. SlimLLM's eq. 8 without the feature space."""
    through = input_norms * output_weight.to(input_norms).norm(dim=0)
    return through + gate_and_up_terms(mlp_input_norms, gate_weight, up_weight)


register.method("lorap", channel_score="lorap", allocation="uniform", recovery="none")
