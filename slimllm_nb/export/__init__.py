"""Pruned models for other tools: checkpoints that travel, stock models, GGUF files for llama.cpp."""

from slimllm_nb.export.checkpoint import save_checkpoint
from slimllm_nb.export.stock import padding_cost, to_stock

__all__ = ["padding_cost", "save_checkpoint", "to_stock"]
