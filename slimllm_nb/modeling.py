"""A LLaMA whose layers differ in width: what is left after structured pruning.

This file travels with every checkpoint (`save_pretrained` copies it there), so it imports torch and transformers
alone. Layer i is built from `config.per_layer_config[i]`, transformers' own way to write down sizes that differ by
layer; KV caches and `generate` read the same place.

Differs from a stock LLaMA layer in three things: the number of query heads, key/value heads and intermediate channels
is the layer's own; `o_proj` and `down_proj` have a bias where the layer was pruned (the shift of the linear regression,
paper section 4.3); and key/value heads may serve uneven numbers of query heads.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)


@strict
class SlimLlamaConfig(LlamaConfig):
    """LlamaConfig plus what a pruned layer needs; the values of single layers stand in `per_layer_config`.

    queries_per_key_value_head: for every key/value head of the layer, in order, how many query heads read it
    (None: all the same, as in a stock model). o_proj_bias, down_proj_bias: whether that projection has a bias.
    """

    model_type = "slim_llama"
    base_model_tp_plan = None  # the widths are not divisible; sharding by heads would cut through groups

    queries_per_key_value_head: list[int] | None = None
    o_proj_bias: bool = False
    down_proj_bias: bool = False

    def validate_architecture(self):
        """Nothing to check: LLaMA's rule (hidden size divisible by the heads) cannot hold when heads are removed."""


class UnevenAttention(LlamaAttention):
    """Attention of a layer whose key/value heads serve uneven numbers of query heads. Where they are even, the layer's
    attention is LlamaAttention itself, which is what vLLM looks for."""

    def __init__(self, config: SlimLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.uneven_groups = config.queries_per_key_value_head
        self.num_key_value_groups = 1  # the heads are expanded here, not by the attention function

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        past_key_values = _Expanding(past_key_values, self.uneven_groups)
        return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)


class _Expanding:
    """Stands between an attention layer and its cache: the cache keeps the few key/value heads that are left, the
    attention function sees one for every query head. Works without a cache as well."""

    def __init__(self, cache, queries_per_head: list[int]):
        self.cache, self.queries_per_head = cache, queries_per_head

    def update(self, keys, values, layer_idx, *args, **kwargs):
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, layer_idx, *args, **kwargs)
        counts = torch.tensor(self.queries_per_head, device=keys.device)
        width = sum(self.queries_per_head)
        return tuple(one.repeat_interleave(counts, dim=1, output_size=width) for one in (keys, values))


class SlimLlamaDecoderLayer(LlamaDecoderLayer):
    """Decoder layer `layer_idx`; `config` is the whole model's."""

    def __init__(self, config: SlimLlamaConfig, layer_idx: int):
        own = config.per_layer_config[layer_idx]
        super().__init__(own, layer_idx)
        if len(set(own.queries_per_key_value_head or [1])) > 1:
            self.self_attn = UnevenAttention(own, layer_idx)
        # Read in every forward pass for the attention implementation, which belongs to the whole model: the masks are
        # made for it, so a layer with another one would see the tokens after it.
        self.self_attn.config = config
        if own.o_proj_bias:
            self.self_attn.o_proj = nn.Linear(self.self_attn.o_proj.in_features, own.hidden_size)
        if own.down_proj_bias:
            self.mlp.down_proj = nn.Linear(own.intermediate_size, own.hidden_size)


class SlimLlamaPreTrainedModel(LlamaPreTrainedModel):
    config: SlimLlamaConfig
    _no_split_modules = ["SlimLlamaDecoderLayer"]  # noqa: RUF012 (transformers' own form)
    _can_record_outputs = {"hidden_states": SlimLlamaDecoderLayer, "attentions": LlamaAttention}  # noqa: RUF012


class SlimLlamaModel(SlimLlamaPreTrainedModel, LlamaModel):
    """LlamaModel, but each layer is built from its own config."""

    def __init__(self, config: SlimLlamaConfig):
        SlimLlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(SlimLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class SlimLlamaForCausalLM(SlimLlamaPreTrainedModel, LlamaForCausalLM):
    """The pruned causal language model; used like any transformers model."""

    def __init__(self, config: SlimLlamaConfig):
        SlimLlamaPreTrainedModel.__init__(self, config)
        config.auto_map = {"AutoModel": f"{__name__.rpartition('.')[2]}.SlimLlamaModel"}  # vLLM asks for it
        self.model = SlimLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


# With the package imported, AutoModelForCausalLM knows the class; without it, the copy in the checkpoint is used.
if not __name__.startswith("transformers_modules"):
    AutoConfig.register(SlimLlamaConfig.model_type, SlimLlamaConfig, exist_ok=True)
    AutoModelForCausalLM.register(SlimLlamaConfig, SlimLlamaForCausalLM, exist_ok=True)
    SlimLlamaConfig.register_for_auto_class()
    SlimLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
