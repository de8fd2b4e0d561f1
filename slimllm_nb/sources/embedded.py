"""The embedded model, SmolLM2-135M-Instruct: a LLaMA with grouped-query attention.

Its published 4-bit weights are dequantised to float32 once; what is cached is an ordinary transformers checkpoint.
"""

import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimllm_nb.files import cache_folder
from slimllm_nb.sources.packages import file_sha256, needing_extra, packaged_file, writing_to_cache

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
    if damage := _damage(converted, weights):
        with needing_extra("embedded", "the embedded model"):
            import accelerate  # noqa: F401  what transformers reads GGUF with
            import gguf  # noqa: F401
        file = packaged_file(GGUF)
        if converted.exists():
            warnings.warn(f"{damage}: converting the embedded model again", stacklevel=3)
            shutil.rmtree(converted)
        print(f"Converting the embedded model into {converted} (once, about a minute)", file=sys.stderr)
        with writing_to_cache("the embedded model"):
            converted.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=converted.parent, ignore_cleanup_errors=True) as partial:
                _convert(file, Path(partial))
                _write_manifest(Path(partial))
                if _damage(converted, ()):  # another process may have been faster
                    Path(partial).rename(converted)
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder} is incomplete ({error!r})"
    return ""


def _convert(file: Path, folder: Path) -> None:
    """GGUF -> safetensors in float32, exactly the numbers that the 4-bit weights stand for. Raises: OSError."""
    try:
        with no_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            # Nothing is quantised any more; left in place, these would make save_pretrained refuse.
            model.hf_quantizer, model.is_quantized = None, False
            del model.config.quantization_config
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    except SafetensorError as error:  # a full disk
        raise OSError(str(error)) from error


def _write_manifest(folder: Path) -> None:
    """Size and SHA-256 of each file."""
    files = sorted(folder.iterdir())
    manifest = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
