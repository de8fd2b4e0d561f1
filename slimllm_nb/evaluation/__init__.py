"""What a model is worth and what it weighs.

Zero-shot accuracy (evaluation.zeroshot) and speed (evaluation.speed) are imported by name: lm-eval and pandas take
seconds to load.
"""

from slimllm_nb.evaluation.perplexity import perplexity, token_blocks
from slimllm_nb.evaluation.size import bytes_on_disk, count_parameters, key_value_bytes_per_token, macs_per_token

__all__ = [
    "bytes_on_disk",
    "count_parameters",
    "key_value_bytes_per_token",
    "macs_per_token",
    "perplexity",
    "token_blocks",
]
