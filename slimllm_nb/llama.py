"""What is asked of a model before anything is done with it, and how a LLaMA layer is laid out.

The layout holds for stock layers and for pruned ones (modeling.py), whose layers differ in width.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

# Sublayer of a decoder layer -> what a method calls its weights -> projection; "output" ends the sublayer.
PROJECTIONS = {
    "self_attn": {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"},
    "mlp": {"gate": "gate_proj", "up": "up_proj", "output": "down_proj"},
}


def require_llama(model: PreTrainedModel) -> None:
    """Raises: ValueError naming the architecture, when it is neither LLaMA's nor what prune() returns."""
    architecture = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if architecture not in ("llama", "slim_llama") or not isinstance(model, LlamaForCausalLM):
        raise ValueError(
            f"the model is a {type(model).__name__} of architecture {architecture!r}; "
            "allowed: a causal language model of architecture 'llama' (and what prune() returns)"
        )


def require_whole(model: PreTrainedModel) -> None:
    """Raises: ValueError for a model whose weights are not all in memory, or that accelerate spread over devices."""
    devices = {parameter.device for parameter in model.parameters()}
    if any(device.type == "meta" for device in devices):
        raise ValueError("some of the model's weights are not in memory (offloaded by a device_map); load it whole")
    if len(devices) > 1 or any(hasattr(module, "_hf_hook") for module in model.modules()):
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"a device_map spread the model over {found}, or offloaded it; load it whole, on one device")


def require_fitting(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises: ValueError when the tokenizer can give a token that the model has no embedding for."""
    vocabulary, largest = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer gives tokens 0 to {largest}, the model's vocabulary is 0 to {vocabulary - 1}: "
            "take the tokenizer that belongs to this model"
        )


def require_length(model: PreTrainedModel, length: int, what: str) -> None:
    """Raises: ValueError when sequences of `length` tokens are longer than the model was made for."""
    if length > (limit := model.config.max_position_embeddings):
        raise ValueError(f"{what} has {length} tokens; the model's limit is {limit}: give shorter sequences")


def require_samples(model: PreTrainedModel, input_ids: Int[Tensor, "samples length"], batch_size: int) -> None:
    """Raises: ValueError for a model that is no LLaMA, for samples that it cannot read, and for a batch of none."""
    require_llama(model)
    if input_ids.ndim != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids is {input_ids.dtype} of shape {tuple(input_ids.shape)}; allowed: integers, (samples, length)"
        )
    if input_ids.min() < 0 or input_ids.max() >= model.config.vocab_size:
        raise ValueError(
            f"input_ids holds tokens {input_ids.min()} to {input_ids.max()}; allowed: 0 to "
            f"{model.config.vocab_size - 1}: the tokenizer does not fit the model"
        )
    require_length(model, input_ids.shape[1], "a calibration sample")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; allowed: at least 1")


@dataclass(frozen=True)
class Widths:
    """Query heads, key/value heads and intermediate channels of one decoder layer."""

    heads: int
    key_value_heads: int
    channels: int


def layer_widths(layer: nn.Module) -> Widths:
    """The widths of a decoder layer as it stands."""
    attention = layer.self_attn
    return Widths(
        heads=attention.q_proj.out_features // attention.head_dim,
        key_value_heads=attention.k_proj.out_features // attention.head_dim,
        channels=layer.mlp.down_proj.in_features,
    )


def queries_per_key_value_head(attention: nn.Module) -> list[int]:
    """For every key/value head of the layer, in order, how many query heads read it."""
    uneven = getattr(attention, "uneven_groups", None)
    return uneven or [attention.num_key_value_groups] * (attention.k_proj.out_features // attention.head_dim)


def key_value_owner(attention: nn.Module) -> Int[Tensor, "heads"]:
    """The key/value head that each query head reads."""
    counts = torch.tensor(queries_per_key_value_head(attention))
    return torch.repeat_interleave(counts).to(attention.q_proj.weight.device)


def head_columns(heads: Int[Tensor, "kept"] | Iterable[int], head_dim: int) -> Int[Tensor, "columns"]:
    """Positions of these heads' values in the (heads * head_dim) axis."""
    heads = heads if isinstance(heads, Tensor) else torch.tensor(list(heads))
    return (heads[:, None] * head_dim + torch.arange(head_dim, device=heads.device)).flatten()


def other_columns(columns: Int[Tensor, "some"], width: int) -> Int[Tensor, "others"]:
    """Those of `width` columns that are not among these, sorted."""
    others = torch.ones(width, dtype=torch.bool, device=columns.device)
    others[columns] = False
    return others.nonzero().flatten()
