"""Models and tokenizers: the embedded one, a local folder or a hub id."""

import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from slimllm_nb.devices import find_device
from slimllm_nb.sources import embedded
from slimllm_nb.sources.families import ALLOWED, as_llama, llama_config, why_not_llama
from slimllm_nb.sources.hub import hub_error, local_copy
from slimllm_nb.sources.packages import SourceError

EMBEDDED_MODEL = "embedded"
# transformers would ask a service of the hub to convert pickles, and take what that wrote in the place of the revision.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them


def load_model(
    model: str = EMBEDDED_MODEL,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
):
    """A LLaMA in evaluation mode: "embedded", a folder with a checkpoint, or a hub id (at `revision`). A Mistral or a
    Qwen2 becomes one (families.as_llama).

    dtype: of the weights; "auto": the checkpoint's own. device: see devices.find_device. Folders written by this
    project (model_type "slim_llama") load as well. Raises: SourceError for a checkpoint that is missing, damaged,
    incomplete or quantized, or that holds weights which the model has no place for, for an architecture other than
    LLaMA's, and for what the hub refuses (no network, no token, no such revision).
    """
    device = find_device(str(device))
    # An accelerator gets the weights file by file; the CPU needs no help, and no accelerate.
    place = {} if device.type == "cpu" else {"device_map": {"": device}}
    if model == EMBEDDED_MODEL:
        with embedded.no_progress_bars():
            folder = embedded.folder(embedded.WEIGHTS)
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **place).eval()
    path, options = _locate(model, revision)
    require_llama_config(model, path, options)
    # transformers would read float8 as numbers, without the scales that belong to them.
    weight_shapes(sorted(Path(path).glob("*.safetensors")))
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **place, **options)
    except (OSError, ValueError, SafetensorError) as error:
        if "does not appear to have a file named" in str(error) or "no file named model.safetensors" in str(error):
            raise SourceError(no_safetensors(model, revision)) from error
        raise _problem("model", model, path, revision, error) from error
    # transformers would go on with random numbers in the place of what is missing or has another shape.
    require_same_weights(model, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return as_llama(loaded.eval())


def empty_model(model: str, revision: str | None = None, dtype: torch.dtype | str = "auto"):
    """A LLaMA without its weights (on the meta device): its config and the shapes that follow; dtype as in load_model.

    Raises: SourceError for what has no config or is no LLaMA, and for what the hub refuses."""
    path, options = _locate(model, revision)
    require_llama_config(model, path, options)
    try:
        config = AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise _problem("model", model, path, revision, error) from error
    if isinstance(dtype, str):
        dtype = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(llama_config(config), dtype=dtype).eval().requires_grad_(False)


def no_safetensors(model: str, revision: str | None = None) -> str:
    """What is said of weights that are missing, or in pickles."""
    command = f"python -m slimllm_nb.sources.convert {model}" + (f" --revision {revision}" if revision else "")
    return (
        f"{model!r} has no weights in safetensors; allowed: {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}. Pickles "
        f"(*.bin), which can run code, are converted once: {command}"
    )


def weight_files(folder: Path) -> dict[str, Path]:
    """The file of every weight in a folder. Raises: SourceError where no file is safetensors, or one is missing."""
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        names = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
    elif (folder / SAFE_WEIGHTS_NAME).is_file():
        names = dict.fromkeys(weight_shapes([folder / SAFE_WEIGHTS_NAME]), SAFE_WEIGHTS_NAME)
    else:
        raise SourceError(no_safetensors(str(folder)))
    if missing := sorted({name for name in names.values() if not (folder / name).is_file()}):
        raise SourceError(f"{folder} lacks {len(missing)} of its files of weights, the first is {missing[0]}")
    return {name: folder / file for name, file in names.items()}


def require_same_weights(
    model: str, missing: Collection[str], extra: Collection[str], other: Collection[tuple]
) -> None:
    """other: (name, shape found, shape that the config says).

    Raises: SourceError naming the first weight that a checkpoint lacks, that the model has no place for, or that has
    another shape."""
    extra = [name for name in extra if not name.endswith("rotary_emb.inv_freq")]  # which old checkpoints hold as well
    for name, found, says in sorted(other, key=str):
        shapes = f"{name} has shape {tuple(found)}; its config says {tuple(says)}"
        raise SourceError(f"cannot load the model {model!r}: {shapes}")
    if missing:
        raise SourceError(f"the checkpoint {model!r} lacks {len(missing)} weights, the first is {min(missing)}")
    if extra:
        found = f"holds {len(extra)} weights that a LLaMA with its config has no place for, the first is {min(extra)}"
        raise SourceError(f"the checkpoint {model!r} {found}: it is of another architecture, or quantized")


def weight_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """The shape of every weight in these files. Raises: SourceError for weights in float8 or integers, and a damaged
    file."""
    shapes = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                dtypes = {name: one.get_dtype() for name, one in found.items()}
                shapes |= {name: tuple(one.get_shape()) for name, one in found.items()}
        except (SafetensorError, OSError) as error:
            raise SourceError(f"cannot read {file}: {error}") from error
        for name, dtype in sorted(dtypes.items()):
            if dtype not in FLOATS:
                raise SourceError(f"{file}: {name} is of {dtype}; allowed: {', '.join(FLOATS)} (not quantized)")
    return shapes


def load_tokenizer(model: str = EMBEDDED_MODEL, *, revision: str | None = None, split_special_tokens: bool = False):
    """The tokenizer that belongs to `load_model(model)`. Raises: SourceError when there is none.

    split_special_tokens: whether what looks like a special token in a text ("<unk>" in Penn Treebank) is read as the
    characters it is made of, not as that token.
    """
    # Only where it is asked for: as a keyword it would be saved with the tokenizer.
    special = {"split_special_tokens": True} if split_special_tokens else {}
    if model == EMBEDDED_MODEL:
        return AutoTokenizer.from_pretrained(embedded.folder(), **special)
    path, options = _locate(model, revision)
    require_llama_config(model, path, options)
    try:
        return AutoTokenizer.from_pretrained(path, **options, **special)
    except (OSError, ValueError, ImportError) as error:
        if "`tiktoken` is required" in str(error):  # what transformers tries where sentencepiece is missing
            needs = "is a SentencePiece model, which needs packages that are not installed: `make sentencepiece`"
            raise SourceError(
                f"the tokenizer of {model!r} {needs}, or pip install 'slimllm-nb[sentencepiece]'"
            ) from error
        raise _problem("tokenizer", model, path, revision, error) from error


def _locate(model: str, revision: str | None) -> tuple[str, dict]:
    """Where transformers is to look, and at which revision: a folder has none."""
    path = local_copy("models", model)
    return path, {} if Path(path).is_dir() or revision is None else {"revision": revision}


def _problem(what: str, model: str, path: str, revision: str | None, error: BaseException) -> SourceError:
    if Path(path).is_dir():
        return SourceError(f"cannot load the {what} {'of ' if what == 'tokenizer' else ''}{model!r}: {error}")
    return hub_error("model", model, revision, error)


def require_llama_config(model: str, path: str, options: dict) -> None:
    """Refuse what is no LLaMA by its config, before any weight is read; register our own architecture if it is ours."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(path, **options)
    except (OSError, ValueError) as error:
        if Path(path).is_dir() or Path(path).is_absolute() or path.count("/") > 1:
            raise SourceError(
                f'no model {model!r}: give "embedded", a folder with a config.json, or a hub id'
            ) from error
        raise hub_error("model", model, options.get("revision"), error) from error
    if config.get("model_type") == "slim_llama":
        from slimllm_nb import modeling  # noqa: F401  importing it registers the architecture
    if reason := why_not_llama(config):
        raise SourceError(f"{model!r} has {reason}; {ALLOWED}")
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "an unknown method")
        raise SourceError(
            f"{model!r} is quantized ({method}, its config's quantization_config): take the model that it was made from"
        )
