"""Cutting weights: one projection's rows and columns at a time, and putting the pieces together as a new model."""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from slimllm_nb.chunks import in_chunks
from slimllm_nb.llama import head_columns, key_value_owner
from slimllm_nb.modeling import SlimLlamaConfig, SlimLlamaForCausalLM


@dataclass(frozen=True)
class Recovered:
    """New weights, or a scale for the old ones, and a bias for the kept inputs of a projection, beside the bias that it
    has; float64."""

    weight: Float[Tensor, "hidden kept"] | Float[Tensor, "hidden"]
    bias: Float[Tensor, "hidden"] | None


def sliced_projection(
    projection: nn.Linear, kept: Int[Tensor, "kept"], recovered: Recovered | None
) -> dict[str, Tensor]:
    """Weight and bias of `o_proj` or `down_proj` with the kept inputs alone; None: nothing was mended."""
    weight, bias = projection.weight[:, kept], projection.bias
    if recovered is not None:
        # Folded in float64 and cast back once.
        new, shift = recovered.weight, recovered.bias
        if new.ndim == 1:
            rows = in_chunks(weight, new)
            new = torch.cat([(some.double() * scale[:, None]).to(weight.dtype) for some, scale in rows])
        if bias is not None:
            shift = bias.double() if shift is None else shift + bias.double()
        weight, bias = new.to(weight.dtype), None if shift is None else shift.to(weight.dtype)
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def sliced_attention(
    attention: nn.Module, kept_heads: Int[Tensor, "kept"], recovered: Recovered | None
) -> dict[str, Tensor]:
    """The tensors of an attention module with the kept query heads, and the key/value heads that one of them reads."""
    query_rows = head_columns(kept_heads, attention.head_dim)
    kept_key_values = key_value_owner(attention)[kept_heads].unique()
    key_value_rows = head_columns(kept_key_values, attention.head_dim)
    output = sliced_projection(attention.o_proj, query_rows, recovered)
    return {
        **_rows(attention, "q_proj", query_rows),
        **_rows(attention, "k_proj", key_value_rows),
        **_rows(attention, "v_proj", key_value_rows),
        **{f"o_proj.{name}": tensor for name, tensor in output.items()},
    }


def sliced_mlp(mlp: nn.Module, kept_channels: Int[Tensor, "kept"], recovered: Recovered | None) -> dict[str, Tensor]:
    """The tensors of an MLP with the kept intermediate channels."""
    output = sliced_projection(mlp.down_proj, kept_channels, recovered)
    return {
        **_rows(mlp, "gate_proj", kept_channels),
        **_rows(mlp, "up_proj", kept_channels),
        **{f"down_proj.{name}": tensor for name, tensor in output.items()},
    }


def _rows(module: nn.Module, projection: str, rows: Tensor) -> dict[str, Tensor]:
    parameters = getattr(module, projection).named_parameters()
    return {f"{projection}.{name}": parameter[rows] for name, parameter in parameters}


def layer_overrides(
    attention: dict[str, Tensor], mlp: dict[str, Tensor], head_dim: int, queries_per_key_value_head: list[int]
) -> dict:
    """The config of a decoder layer with these tensors, as an entry of `per_layer_config`."""
    even = len(set(queries_per_key_value_head)) == 1
    return {
        "num_attention_heads": len(attention["q_proj.weight"]) // head_dim,
        "num_key_value_heads": len(attention["k_proj.weight"]) // head_dim,
        "intermediate_size": len(mlp["gate_proj.weight"]),
        "queries_per_key_value_head": None if even else queries_per_key_value_head,
        "o_proj_bias": "o_proj.bias" in attention,
        "down_proj_bias": "down_proj.bias" in mlp,
    }


def assemble(
    model: LlamaForCausalLM, layer_tensors: list[dict[str, Tensor]], overrides: list[dict]
) -> SlimLlamaForCausalLM:
    """A new model with these decoder layers; embeddings, norms and head are copied from `model`."""
    settings = model.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "per_layer_config"):
        settings.pop(key, None)
    config = SlimLlamaConfig(**settings, per_layer_config=dict(enumerate(overrides)))
    config._attn_implementation = model.config._attn_implementation
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("model.layers.")}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for index, layer in enumerate(layer_tensors):
        tensors |= {f"model.layers.{index}.{name}": tensor for name, tensor in layer.items()}
    with torch.device("meta"):  # no memory for weights that are about to be replaced
        pruned = SlimLlamaForCausalLM(config)
    missing, unexpected = pruned.load_state_dict(tensors, strict=False, assign=True)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    pruned.tie_weights()
    pruned.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # its buffers are not in the state dict
    pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned.requires_grad_(False).eval()
