"""Pruned models for other tools: checkpoints that travel, even groups for vLLM, stock models, GGUF files."""

from slimllm_nb.export.checkpoint import save_checkpoint
from slimllm_nb.export.elsewhere import logits_elsewhere
from slimllm_nb.export.even_groups import to_even_groups
from slimllm_nb.export.stock import padding_cost, to_stock

__all__ = ["logits_elsewhere", "padding_cost", "save_checkpoint", "to_even_groups", "to_stock"]
