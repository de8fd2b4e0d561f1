"""A new model put together from decoder layers that were cut."""

import copy

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from slimllm_nb.modeling import SlimLlamaConfig, SlimLlamaForCausalLM


def layer_overrides(tensors: dict[str, Tensor], head_dim: int, queries_per_key_value_head: list[int]) -> dict:
    """The config of a decoder layer with these tensors, as an entry of `per_layer_config`."""
    even = len(set(queries_per_key_value_head)) == 1
    return {
        "num_attention_heads": len(tensors["self_attn.q_proj.weight"]) // head_dim,
        "num_key_value_heads": len(tensors["self_attn.k_proj.weight"]) // head_dim,
        "intermediate_size": len(tensors["mlp.gate_proj.weight"]),
        "queries_per_key_value_head": None if even else queries_per_key_value_head,
        "o_proj_bias": "self_attn.o_proj.bias" in tensors,
        "down_proj_bias": "mlp.down_proj.bias" in tensors,
    }


def assemble(
    model: LlamaForCausalLM, layer_tensors: list[dict[str, Tensor]], overrides: list[dict]
) -> SlimLlamaForCausalLM:
    """A new model with these decoder layers; embeddings, norms and head are copied from `model`, in their dtype."""
    settings = model.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "quantization_config", "per_layer_config"):
        settings.pop(key, None)
    config = SlimLlamaConfig(**settings, per_layer_config=dict(enumerate(overrides)))
    config._attn_implementation = model.config._attn_implementation
    outside = {name: one for name, one in model.state_dict().items() if not name.startswith("model.layers.")}
    dtype = next(iter(layer_tensors[0].values())).dtype
    tensors = {name: one.to(dtype, copy=True) for name, one in outside.items()}
    for index, layer in enumerate(layer_tensors):
        tensors |= {f"model.layers.{index}.{name}": one for name, one in layer.items()}
    with torch.device("meta"):  # no memory for weights that are about to be replaced
        pruned = SlimLlamaForCausalLM(config)
    pruned.load_state_dict(tensors, assign=True)
    pruned.tie_weights()
    pruned.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # its buffers are not in the state dict
    pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned.eval()
