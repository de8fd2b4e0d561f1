"""Models and texts: the embedded ones that need no hub and no account, a local folder, or a hub id.

The embedded model is SmolLM2-135M-Instruct, a LLaMA with grouped-query attention. Its published 4-bit weights are
dequantised to float32 once; what is cached is an ordinary transformers checkpoint. The embedded texts are Lee's news
documents and a shortened dump of the English Wikipedia, split by document into a calibration and a held-out half.
"""

import hashlib
import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from slimllm_nb import articles
from slimllm_nb.downloads import SourceError, cache_folder, cached_file, changing_cache, file_sha256, partial_folder

__all__ = ["CORPORA", "SPLITS", "SourceError", "cache_folder", "load_model", "load_texts", "load_tokenizer"]

CORPORA = ("news", "wikipedia")
SPLITS = ("calibration", "held-out")

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERTED = "SmolLM2-135M-Instruct-float32-1"  # raise the number when the conversion changes
WEIGHTS = "model.safetensors"
MANIFEST = "manifest.json"
NEWS = "lee_background.cor"
WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def load_model(model: str = "embedded", *, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """A LLaMA in evaluation mode: "embedded", a folder with a checkpoint, or a hub id.

    Folders written by this project (model_type "slim_llama") load as well. Raises SourceError for a checkpoint that
    is missing, damaged or incomplete, and for an architecture other than LLaMA's.
    """
    if model == "embedded":
        with _no_progress_bars():
            return AutoModelForCausalLM.from_pretrained(_embedded_folder(WEIGHTS), dtype=dtype).to(device)
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
        return AutoTokenizer.from_pretrained(_embedded_folder())
    _require_llama(model)
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot load the tokenizer of {model!r}: {error}") from error


def load_texts(corpus: str, split: str) -> list[str]:
    """The documents of one half of an embedded corpus, in the corpus's own order, none twice.

    corpus: "news" or "wikipedia"; split: "calibration" (documents 0, 2, 4, ...) or "held-out" (1, 3, 5, ...). The
    halves share no document and are the same on every machine. News agencies send
    a report again with a few words changed, so a held-out document more than half of whose sequences of 8 words stand
    in calibration documents is left out. Raises SourceError for any other name.
    """
    if corpus not in CORPORA:
        raise SourceError(f"unknown corpus {corpus!r}; allowed: {', '.join(CORPORA)}")
    if split not in SPLITS:
        raise SourceError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
    documents = _news() if corpus == "news" else _wikipedia()
    calibration, held_out = documents[::2], documents[1::2]
    return calibration if split == "calibration" else _without_near_copies(held_out, calibration)


def _without_near_copies(documents: list[str], seen: list[str], words: int = 8) -> list[str]:
    """The documents less than half of whose sequences of 8 words occur in the `seen` ones."""

    def sequences(document: str) -> set[tuple[str, ...]]:
        parts = document.split()
        return {tuple(parts[i : i + words]) for i in range(len(parts) - words + 1)}

    known = set().union(*map(sequences, seen))
    return [one for one in documents if 2 * len(sequences(one) & known) <= len(sequences(one))]


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


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()


def _embedded_folder(*weights: str) -> Path:
    """The embedded model's folder, converted first where it is missing or damaged.

    The tokenizer and config files are always checked against the manifest, the `weights` only where they are named:
    hashing them takes half a second, about as long as loading them.
    """
    folder = cache_folder() / CONVERTED
    if not _damage(folder, weights):
        return folder
    gguf = cached_file(GGUF)
    with changing_cache():
        if damage := _damage(folder, weights):  # another process may have converted it while this one waited
            if folder.exists():
                warnings.warn(f"{damage}: converting the embedded model again", stacklevel=3)
                shutil.rmtree(folder)
            _convert(gguf, folder)
    return folder


def _damage(folder: Path, weights: tuple[str, ...]) -> str:
    """What is wrong with the converted model's files; empty when nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{folder / name} has {size:,} bytes, expected {expected['bytes']:,}"
            if (name in weights or name != WEIGHTS) and file_sha256(folder / name) != expected["sha256"]:
                return f"{folder / name} has the wrong SHA-256"
    except (FileNotFoundError, ValueError) as error:
        return f"{folder} is incomplete ({error})"
    return ""


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF -> safetensors in float32, exactly the numbers that the 4-bit weights stand for. Takes about a minute."""
    print(f"Converting the embedded model into {folder} (once, about a minute)", file=sys.stderr)
    with partial_folder() as partial, _no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # Nothing is quantised any more; left in place, these would make save_pretrained refuse.
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
        finish_conversion(partial, folder)


def finish_conversion(partial: Path, folder: Path) -> None:
    """Write the manifest (size and SHA-256 of each file), then give the complete folder its final name."""
    files = sorted(partial.iterdir())
    manifest = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    partial.rename(folder)


def _news() -> list[str]:
    """Lee's 300 news documents, one a line, without the 7 that occur before."""
    lines = cached_file(NEWS).read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def _wikipedia() -> list[str]:
    """The dump's articles as prose; cleaned once (8 s) and then read from a JSON file in the cache."""
    path = cache_folder() / f"wikipedia-{articles.VERSION}.json"
    if (texts := _read_texts(path)) is not None:
        return texts
    dump = cached_file(WIKIPEDIA)
    with changing_cache(), partial_folder() as partial:
        texts = [prose for _, prose in articles.read_articles(dump)]
        content = {"sha256": _digest(texts), "texts": texts}
        (partial / path.name).write_text(json.dumps(content, ensure_ascii=False, indent=0), encoding="utf-8")
        (partial / path.name).replace(path)
    return texts


def _read_texts(path: Path) -> list[str] | None:
    """The texts of a cached file; None where it is missing or damaged, which cleaning the dump again repairs."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content["texts"] if content["sha256"] == _digest(content["texts"]) else None


def _digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
