"""The same function with as many query heads for every key/value head of a layer, for engines that know no other."""

import math

import torch
from transformers import LlamaForCausalLM

from slimllm_nb.checks import require_plain
from slimllm_nb.llama import head_columns, queries_per_key_value_head
from slimllm_nb.modeling import SlimLlamaForCausalLM
from slimllm_nb.pruning.slicing import assemble, layer_overrides


def has_even_groups(model: LlamaForCausalLM) -> bool:
    """Whether in every layer all key/value heads serve as many query heads."""
    return all(len(set(queries_per_key_value_head(layer.self_attn))) == 1 for layer in model.model.layers)


@torch.no_grad()
def to_even_groups(model: LlamaForCausalLM) -> SlimLlamaForCausalLM:
    """A new model with the same logits; `model` (dense or pruned) is left as it is.

    Where the key/value heads of a layer serve uneven numbers of query heads, each of them is written down as often as
    it takes for all to serve the largest number that divides these numbers: more parameters and a larger KV cache.
    Other layers stay as they are. Raises: ValueError for an architecture that is not LLaMA's, and layers that are not
    as the config says or no plain linear ones.
    """
    require_plain(model)
    tensors, overrides = [], []
    for layer in model.model.layers:
        attention, own = layer.self_attn, {name: one.clone() for name, one in layer.state_dict().items()}
        counts = queries_per_key_value_head(attention)
        size = math.gcd(*counts)
        owners = [owner for owner, count in enumerate(counts) for _ in range(count // size)]
        rows = head_columns(owners, attention.head_dim)
        own |= {name: one[rows] for name, one in own.items() if name.split(".")[1] in ("k_proj", "v_proj")}
        tensors.append(own)
        overrides.append(layer_overrides(own, attention.head_dim, [size] * len(owners)))
    return assemble(model, tensors, overrides)
