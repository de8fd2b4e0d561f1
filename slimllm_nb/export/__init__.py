"""Pruned models for other tools: checkpoints that travel, even groups for vLLM, stock models, GGUF files."""

from slimllm_nb.export.checkpoint import save_checkpoint
from slimllm_nb.export.even_groups import to_even_groups
from slimllm_nb.export.stock import padding_cost, to_stock

__all__ = ["padding_cost", "save_checkpoint", "to_even_groups", "to_stock"]
