"""How a LLaMA layer is laid out: a stock one, or a pruned one (modeling.py), whose layers differ in width."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

# Sublayer of a decoder layer -> what a method calls its weights -> projection; "output" ends the sublayer.
PROJECTIONS = {
    "self_attn": {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"},
    "mlp": {"gate": "gate_proj", "up": "up_proj", "output": "down_proj"},
}


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
