"""Weights in pickles as safetensors, once: python -m slimllm_nb.sources.convert MODEL [--revision R] [--target FOLDER]

Vicuna's folder holds pickles and a SentencePiece tokenizer alone. A pickle can run code; PyTorch reads these with
weights_only, which makes tensors of them and refuses all else. What comes out takes the model's place from then on.
"""

import argparse
import shutil
import sys
from pathlib import Path

from slimllm_nb.command import command
from slimllm_nb.files import expanded
from slimllm_nb.sources.hub import hub_error, hub_folder, local_copy
from slimllm_nb.sources.models import load_tokenizer


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slimllm_nb.sources.convert", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a hub id, or a folder")
    parser.add_argument("--revision", help="of the hub id (default: its newest)")
    parser.add_argument("--target", type=expanded, help="default: where the hub id is looked for before the hub")
    options = parser.parse_args(arguments)
    if options.target is None and Path(options.model).is_dir():
        raise ValueError(f"{options.model} is a folder: give a --target")
    target = options.target or hub_folder() / "models" / options.model
    convert(options.model, target, options.revision)
    print(f"Written: {target}")
    return 0


def convert(model: str, target: Path, revision: str | None = None) -> None:
    """Read the pickles of a hub id or folder, write safetensors and a tokenizer.json into `target`, whole or not at
    all; in the weights' own dtype. Needs memory for the whole model.

    Raises: FileExistsError for a target that is there; SourceError for what cannot be had or read.
    """
    from transformers import AutoModelForCausalLM

    if target.exists():
        raise FileExistsError(f"{target} is there already: remove it, or give another --target")
    partial, place = target.with_name(f".{target.name}.partial"), local_copy("models", model)
    shutil.rmtree(partial, ignore_errors=True)
    load_tokenizer(model, revision=revision).save_pretrained(partial)
    options = {} if Path(place).is_dir() else {"revision": revision or "main"}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(place, dtype="auto", use_safetensors=False, **options)
        loaded.save_pretrained(partial)
    except Exception as error:  # what weights_only refuses, no network: one of many kinds
        shutil.rmtree(partial)
        raise hub_error("model", model, revision, error) from error
    partial.rename(target)


if __name__ == "__main__":
    sys.exit(main())
