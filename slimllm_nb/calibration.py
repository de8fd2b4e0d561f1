"""What the model sees while it is pruned: samples of text, and its activations decoder layer by decoder layer."""

import copy
import random
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.masking_utils import create_causal_mask

from slimllm_nb.checks import require_texts


def draw_samples(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, num_samples: int = 32, length: int = 128, seed: int = 42
) -> Int[Tensor, "samples length"]:
    """`num_samples` windows of `length` tokens: documents at random, none twice, a random window in each.

    A document counts only if it has at least `length` tokens. Paper section 5.1 (32 x 128) and the authors' code.
    Raises: ValueError when too few documents are long enough; it names how many there are.
    """
    generator, documents = random.Random(seed), tokenized(texts, tokenizer, num_samples, length)
    long_enough = [ids for ids in documents if len(ids) >= length]
    if len(long_enough) < num_samples:
        longest = max(map(len, documents), default=0)
        raise ValueError(
            f"{num_samples} samples of {length} tokens were asked for, but only {len(long_enough)} of {len(texts)} "
            f"texts have that many tokens (the longest has {longest}): give longer or more texts, or a smaller length"
        )
    starts = [(ids, generator.randrange(len(ids) - length + 1)) for ids in generator.sample(long_enough, num_samples)]
    return torch.tensor([ids[start : start + length] for ids, start in starts])


def tokenized(texts, tokenizer, num_samples: int, length: int) -> list[list[int]]:
    """The texts' token ids. Raises: ValueError for numbers out of range, and texts that are none."""
    texts = require_texts(texts)
    if num_samples < 1 or length < 2:
        raise ValueError(f"num_samples is {num_samples} and length {length}; allowed: at least 1 and at least 2")
    return tokenizer(texts)["input_ids"] if texts else []


def embed(model: LlamaForCausalLM, input_ids: Int[Tensor, "samples length"]) -> Float[Tensor, "samples length hidden"]:
    """The input of the first decoder layer."""
    return model.model.embed_tokens(input_ids.to(model.device))


def layer_context(model: LlamaForCausalLM, hidden: Float[Tensor, "samples length hidden"]) -> dict:
    """The keyword arguments, beside the hidden states, that `model` hands to each of its decoder layers."""
    position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
    mask = create_causal_mask(
        config=model.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=position_ids
    )
    return {"attention_mask": mask, "position_embeddings": model.model.rotary_emb(hidden, position_ids=position_ids)}


def _without(module: nn.Module, projection: str) -> nn.Module:
    """A view of `module` that returns the input of `projection`; shares all weights, changes nothing."""
    view = copy.copy(module)
    view._modules = {**module._modules, projection: nn.Identity()}
    return view


def head_inputs(
    layer: nn.Module, hidden: Float[Tensor, "samples length hidden"], context: dict
) -> Float[Tensor, "tokens heads head_dim"]:
    """The input of `o_proj` of this decoder layer, by head: X_h of paper section 4.1."""
    attention = _without(layer.self_attn, "o_proj")
    mixed = attention(layer.input_layernorm(hidden), **context)[0]
    return mixed.flatten(0, 1).unflatten(1, (-1, attention.head_dim))


def mlp_inputs(
    layer: nn.Module, after_attention: Float[Tensor, "samples length hidden"]
) -> Float[Tensor, "tokens hidden"]:
    """The input of the MLP of this decoder layer: X of paper section 4.2."""
    return layer.post_attention_layernorm(after_attention).flatten(0, 1)


def mlp_activations(
    layer: nn.Module, inputs: Float[Tensor, "tokens hidden"], channels: Int[Tensor, "some"] | None = None
) -> Float[Tensor, "tokens intermediate"]:
    """The input of `down_proj`: A of paper section 4.2, or some of its columns alone."""
    gated = _without(layer.mlp, "down_proj")
    rows = {name: one if channels is None else one[channels] for name, one in gated.named_parameters()}
    return functional_call(gated, rows, (inputs,))
