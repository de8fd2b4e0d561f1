"""The embedded model, SmolLM2-135M-Instruct: a LLaMA with grouped-query attention.

Its published 4-bit weights are dequantised to float32 once; what is cached is an ordinary transformers checkpoint.
"""

import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimllm_nb.sources.downloads import (
    cache_folder,
    cached_file,
    changing_cache,
    file_sha256,
    needing_extra,
    partial_folder,
)

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERTED = "SmolLM2-135M-Instruct-float32-1"  # raise the number when the conversion changes
WEIGHTS = "model.safetensors"
MANIFEST = "manifest.json"


@contextmanager
def no_progress_bars() -> Iterator[None]:
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()


def folder(*weights: str) -> Path:
    """The embedded model's folder, converted first where it is missing or damaged.

    The tokenizer and config files are always checked against the manifest, the `weights` only where they are named:
    hashing them takes half a second, about as long as loading them.
    """
    converted = cache_folder() / CONVERTED
    if not _damage(converted, weights):
        return converted
    with needing_extra("embedded", "the embedded model"):
        import accelerate  # noqa: F401  what transformers reads GGUF with
        import gguf  # noqa: F401
    file = cached_file(GGUF)
    with changing_cache():
        if damage := _damage(converted, weights):  # another process may have converted it while this one waited
            if converted.exists():
                warnings.warn(f"{damage}: converting the embedded model again", stacklevel=3)
                shutil.rmtree(converted)
            _convert(file, converted)
    return converted


def _damage(folder: Path, weights: tuple[str, ...]) -> str:
    """What is wrong with the converted model's files; empty when nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if missing := {WEIGHTS, "config.json"} - manifest.keys():
            return f"{folder / MANIFEST} names no {', '.join(sorted(missing))}"
        for name, expected in manifest.items():
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{folder / name} has {size:,} bytes, expected {expected['bytes']:,}"
            if (name in weights or name != WEIGHTS) and file_sha256(folder / name) != expected["sha256"]:
                return f"{folder / name} has the wrong SHA-256"
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder} is incomplete ({error!r})"
    return ""


def _convert(file: Path, folder: Path) -> None:
    """GGUF -> safetensors in float32, exactly the numbers that the 4-bit weights stand for. Takes about a minute."""
    print(f"Converting the embedded model into {folder} (once, about a minute)", file=sys.stderr)
    with partial_folder() as partial, no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        # Nothing is quantised any more; left in place, these would make save_pretrained refuse.
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
        finish_conversion(partial, folder)


def finish_conversion(partial: Path, folder: Path) -> None:
    """Write the manifest (size and SHA-256 of each file), then give the complete folder its final name."""
    files = sorted(partial.iterdir())
    manifest = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    partial.rename(folder)
