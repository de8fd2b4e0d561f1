"""Models of other families that compute what a LLaMA does: Mistral without a sliding window, Qwen2 and Qwen2.5."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from slimllm_nb.checks import LLAMAS

NO_OUTPUT_BIAS = "qwen2"  # has biases on q, k and v; LLaMA's o_proj has one with them, which is zero then
ALLOWED = "allowed: 'llama' (or a checkpoint of this project), 'mistral' and 'qwen2' without a sliding window"
OTHERWISE = {  # what a LLaMA does not compute
    "qwen3": "it normalises queries and keys",
    "olmo2": "it normalises queries and keys",
    "gemma": "it scales its embeddings and norms",
    "gemma2": "it scales its embeddings and norms",
    "phi": "its layers are parallel",
    "phi3": "its projections are fused",
    "mixtral": "it is a mixture of experts",
    "qwen2_moe": "it is a mixture of experts",
    "qwen3_moe": "it is a mixture of experts",
}


def why_not_llama(config: Mapping) -> str | None:
    """Why a model with this config.json cannot be had as a LLaMA; None where it can."""
    family, longest = config.get("model_type"), config.get("max_position_embeddings", 1 << 20)
    if family in LLAMAS:
        return None
    if family not in ("mistral", "qwen2"):
        return f"model_type {family!r}" + (f" ({OTHERWISE[family]})" if family in OTHERWISE else "")
    window = config.get("sliding_window", 4096)  # where it is not given, transformers takes that
    used = family == "mistral" or config.get("use_sliding_window", False)
    if used and window and window < longest:
        return f"model_type {family!r} with a sliding window of {window} tokens"
    return None


def llama_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the LLaMA that computes the same. Raises: ValueError where there is none."""
    if config.model_type in LLAMAS:
        return config
    if reason := why_not_llama(config.to_dict()):
        raise ValueError(f"the model has {reason}; {ALLOWED}")
    own = config.to_dict()
    names = LlamaConfig().to_dict().keys() & own.keys() - {"model_type", "architectures", "transformers_version"}
    changed = {"attention_bias": config.model_type == NO_OUTPUT_BIAS, "dtype": config.dtype}
    return LlamaConfig(**{name: own[name] for name in names} | changed)


def output_biases(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The biases, all zero, of every o_proj of this LLaMA, which NO_OUTPUT_BIAS does not have."""
    names = [f"model.layers.{index}.self_attn.o_proj.bias" for index in range(config.num_hidden_layers)]
    return {name: torch.zeros(config.hidden_size, dtype=dtype, device=device) for name in names}


def as_llama(model: PreTrainedModel) -> PreTrainedModel:
    """The LLaMA that computes the same as a Mistral or a Qwen2, and shares its weights; a LLaMA as it is.

    load_model and disk.prune_checkpoint do so by themselves. Raises: ValueError for what is no LLaMA in disguise.
    """
    config = llama_config(model.config)
    if config is model.config:
        return model
    tensors = model.state_dict()
    if config.attention_bias:
        tensors |= output_biases(config, model.dtype, model.device)
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    llama.load_state_dict(tensors, assign=True)
    llama.tie_weights()
    llama.model.rotary_emb = LlamaRotaryEmbedding(config).to(model.device)  # its buffers are not in the state dict
    llama.generation_config = copy.deepcopy(model.generation_config)
    return llama.train(model.training)
