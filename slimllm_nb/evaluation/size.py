"""What a model weighs: parameters, multiply-accumulates and cache bytes per token, bytes on disk."""

from pathlib import Path

from torch import nn
from transformers import LlamaForCausalLM

from slimllm_nb.checks import require_llama


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Exact numbers of parameters: of the whole model (tied weights once) and of its decoder layers alone."""
    return {
        "model": sum(p.numel() for p in model.parameters()),
        "decoder": sum(p.numel() for p in model.model.layers.parameters()),
    }


def macs_per_token(model: LlamaForCausalLM, context: int = 128) -> int:
    """Multiply-accumulates for one token that attends to `context` tokens, itself among them.

    Every weight of a linear layer counts once (the output head too, whether its weights are tied or not), attention
    twice context * heads * head_dim per layer (scores, weighted sum). Not counted, as usual: norms, rotation, softmax,
    biases, and looking up the embedding. Raises: ValueError for an architecture other than LLaMA's.
    """
    require_llama(model)
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    attention = sum(2 * context * layer.self_attn.q_proj.out_features for layer in model.model.layers)
    return linear + attention


def key_value_bytes_per_token(model: LlamaForCausalLM) -> int:
    """Bytes that one token takes in the KV cache: keys and values of the heads that each layer has left.

    Raises: ValueError for an architecture other than LLaMA's.
    """
    require_llama(model)
    widths = [layer.self_attn.k_proj.out_features + layer.self_attn.v_proj.out_features for layer in model.model.layers]
    return sum(widths) * model.dtype.itemsize


def bytes_on_disk(folder: str | Path) -> int:
    """Size of a checkpoint's weight files. Raises: FileNotFoundError when the folder has none."""
    files = list(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no *.safetensors file")
    return sum(path.stat().st_size for path in files)
