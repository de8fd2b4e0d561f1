"""What is asked of a model, a tokenizer and samples before anything is done with them."""

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase


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


def require_finite(values: Tensor, where: str, what: str = "activations") -> None:
    """Raises: ValueError that names the layer and its part when a value, or a sum of them, is not finite."""
    # A sum is finite only where all of its terms are: one pass over them.
    if not torch.isfinite(values.sum(dtype=torch.promote_types(values.dtype, torch.float32))):
        raise ValueError(f"{where}: {what} are not finite (NaN or infinite); check the weights and the dtype")
