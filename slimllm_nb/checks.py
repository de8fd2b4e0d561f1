"""What is asked of a model, a tokenizer and samples before anything is done with them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from slimllm_nb.llama import PROJECTIONS, Widths, layer_widths

LLAMAS = ("llama", "slim_llama")  # architectures: LLaMA's, and what prune() returns
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def require_llama(model: PreTrainedModel) -> None:
    """Raises: ValueError naming the architecture, when it is neither LLaMA's nor what prune() returns."""
    if hasattr(model, "merge_and_unload"):
        raise ValueError(f"the model is a {type(model).__name__}, with adapters: merge_and_unload() first")
    architecture = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if architecture not in LLAMAS or not isinstance(model, LlamaForCausalLM):
        raise ValueError(
            f"the model is a {type(model).__name__} of architecture {architecture!r}; "
            "allowed: a causal language model of architecture 'llama' (and what prune() returns; sources.as_llama "
            "makes one of a Mistral or a Qwen2)"
        )


def require_plain(model: PreTrainedModel) -> None:
    """Raises: ValueError for a model that is no LLaMA, for layers that are not as its config says, and for weights that
    are not those of plain linear layers: adapters, quantization."""
    require_llama(model)
    layers, config = model.model.layers, model.config
    if len(layers) != config.num_hidden_layers:
        says = f"its config says num_hidden_layers {config.num_hidden_layers}: change the config with the layers"
        raise ValueError(f"the model has {len(layers)} decoder layers, {says}")
    for index, layer in enumerate(layers):
        for sublayer, projections in PROJECTIONS.items():
            for name in projections.values():
                _require_linear(getattr(getattr(layer, sublayer), name), f"{name} of layer {index}")
        own = config.per_layer_config[index] if config.model_type == "slim_llama" else config
        says = Widths(own.num_attention_heads, own.num_key_value_heads, own.intermediate_size)
        if (found := layer_widths(layer)) != says:
            raise ValueError(f"layer {index} has {found}, its config says {says}: change the config with the layers")
    _require_linear(model.lm_head, "lm_head")


def _require_linear(module: nn.Module, name: str) -> None:
    kind, weight = type(module), getattr(module, "weight", None)
    if kind is not nn.Linear:
        package = [one for one in kind.__module__.split(".") if one not in ("layer", "linear", "modules", "nn")][-1]
        adapter = hasattr(module, "base_layer")
        remedy = "merge_and_unload() first" if adapter else "allowed: nn.Linear, so load the model without quantization"
        raise ValueError(f"{name} is {package}.{kind.__name__}: {remedy}")
    # Tensors that stand for quantized ones say that they are floats.
    if weight.dtype not in FLOATS or type(weight).dequantize is not Tensor.dequantize:
        raise ValueError(f"{name} holds {type(weight).__name__} of {weight.dtype}: load the model without quantization")


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


def require_texts(texts: Iterable[str]) -> list[str]:
    """The texts as a list. Raises: ValueError for one string in the place of several, whose characters would be taken
    for texts."""
    found = [] if isinstance(texts, str) else list(texts)
    if isinstance(texts, str) or not all(isinstance(one, str) for one in found):
        says = "one string" if isinstance(texts, str) else f"a {type(texts).__name__} of other things than strings"
        raise ValueError(f"texts is {says}; allowed: a list of strings, one for each document")
    return found


def require_ids(model: PreTrainedModel, input_ids: Int[Tensor, "samples length"], what: str = "input_ids") -> None:
    """Raises: ValueError for token ids that the model cannot read, that hold padding, or that are too long."""
    allowed = "allowed: a tensor of integers, (samples, length), with at least one sample and two tokens"
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"{what} is a {type(input_ids).__name__}; {allowed}, such as tokenizer(...)['input_ids']")
    integers = not input_ids.is_floating_point() and input_ids.dtype != torch.bool
    if not integers or input_ids.ndim != 2 or not len(input_ids) or input_ids.shape[1] < 2:
        raise ValueError(f"{what} is {input_ids.dtype} of shape {tuple(input_ids.shape)}; {allowed}")
    if input_ids.min() < 0 or input_ids.max() >= model.config.vocab_size:
        raise ValueError(
            f"{what} holds tokens {input_ids.min()} to {input_ids.max()}; allowed: 0 to "
            f"{model.config.vocab_size - 1}: the tokenizer does not fit the model"
        )
    padding = model.config.pad_token_id
    if padding is not None and len(padded := _padded(input_ids, padding)):
        raise ValueError(
            f"{what} holds padding (token {padding}) in {len(padded)} samples, the first is sample {padded[0]}; "
            "allowed: samples of one length without padding, such as calibration.draw_samples gives"
        )
    require_length(model, input_ids.shape[1], f"a sample of {what}")


def _padded(input_ids: Int[Tensor, "samples length"], padding: int) -> list[int]:
    """Samples that begin or end with two padding tokens; one alone may be the end of a text."""
    ends = torch.stack([input_ids[:, :2], input_ids[:, -2:]])
    return (ends == padding).all(2).any(0).nonzero().flatten().tolist()


def require_batch_size(batch_size: int) -> None:
    """Raises: ValueError for a batch of none."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; allowed: at least 1")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside it the model does not drop out; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def require_finite(values: Tensor, where: str, what: str = "activations") -> None:
    """Raises: ValueError that names the layer and its part when a value, or a sum of them, is not finite."""
    # A sum is finite only where all of its terms are: one pass over them.
    if not torch.isfinite(values.sum(dtype=torch.promote_types(values.dtype, torch.float32))):
        raise ValueError(f"{where}: {what} are not finite (NaN or infinite); check the weights and the dtype")
