"""Models and tokenizers: the embedded one, a local folder or a hub id."""

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from slimllm_nb.sources import embedded
from slimllm_nb.sources.downloads import SourceError


def load_model(model: str = "embedded", *, dtype: torch.dtype | str = torch.float32, device: str = "cpu"):
    """A LLaMA in evaluation mode: "embedded", a folder with a checkpoint, or a hub id.

    dtype: of the weights; "auto": the checkpoint's own. Folders written by this project (model_type "slim_llama") load
    as well. Raises SourceError for a checkpoint that is missing, damaged or incomplete, and for an architecture other
    than LLaMA's.
    """
    if model == "embedded":
        with embedded.no_progress_bars():
            return AutoModelForCausalLM.from_pretrained(embedded.folder(embedded.WEIGHTS), dtype=dtype).to(device)
    _require_llama(model)
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise SourceError(f"cannot load the model {model!r}: {error}") from error
    if info["missing_keys"]:  # transformers would go on with random numbers in their place
        missing = sorted(info["missing_keys"])
        raise SourceError(f"the checkpoint {model!r} lacks {len(missing)} weights, the first is {missing[0]}")
    return loaded.to(device).eval()


def load_tokenizer(model: str = "embedded"):
    """The tokenizer that belongs to `load_model(model)`. Raises SourceError when there is none."""
    if model == "embedded":
        return AutoTokenizer.from_pretrained(embedded.folder())
    _require_llama(model)
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot load the tokenizer of {model!r}: {error}") from error


def _require_llama(model: str) -> None:
    """Refuse what is no LLaMA by its config, before any weight is read; register our own architecture if it is ours."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(model)
    except (OSError, ValueError) as error:
        raise SourceError(f'no model {model!r}: give "embedded", a folder with a config.json, or a hub id') from error
    model_type = config.get("model_type")
    if model_type == "slim_llama":
        from slimllm_nb import modeling  # noqa: F401  importing it registers the architecture
    elif model_type != "llama":
        raise SourceError(
            f"{model!r} has model_type {model_type!r}; allowed: 'llama' (or a checkpoint of this project)"
        )
