"""Pruning from disk to disk: a model that need not fit in memory, one decoder layer at a time."""

from slimllm_nb.disk.stored import StoredModel
from slimllm_nb.disk.streamed import prune_checkpoint

__all__ = ["StoredModel", "prune_checkpoint"]
