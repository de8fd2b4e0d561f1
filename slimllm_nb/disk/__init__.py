"""From disk, one decoder layer at a time: pruning and perplexity of a model that need not fit in memory."""

from slimllm_nb.disk.perplexity import checkpoint_perplexity
from slimllm_nb.disk.stored import StoredModel
from slimllm_nb.disk.streamed import prune_checkpoint

__all__ = ["StoredModel", "checkpoint_perplexity", "prune_checkpoint"]
