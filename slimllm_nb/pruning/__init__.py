"""SlimLLM as a whole (paper section 4): prune(model, input_ids, ...) and the report of what it did."""

from slimllm_nb.pruning.prune import layer_similarities, prune
from slimllm_nb.pruning.report import LayerReport, PartReport, PruningReport

__all__ = ["LayerReport", "PartReport", "PruningReport", "layer_similarities", "prune"]
