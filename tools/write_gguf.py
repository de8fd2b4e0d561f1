"""Write the GGUF file of a checkpoint of this project, beside it: tools/write_gguf.py [--profile NAME] CHECKPOINT"""

import argparse
import sys

from slimllm_nb.command import command
from slimllm_nb.export.gguf import write_gguf
from slimllm_nb.reproduce import load_profile, run_folder
from slimllm_nb.sources import load_model, load_tokenizer


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/write_gguf.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a folder of the profile's run folder, such as model, or any other's path")
    parser.add_argument("--profile", default="embedded", help="whose run folder: a name, or a .yaml file's path")
    parser.add_argument(
        "--pre-tokenizer",
        help="llama.cpp's name for how text is cut, or none: no vocabulary (default: as the tokenizer is recognised)",
    )
    options = parser.parse_args(arguments)
    folder = run_folder(load_profile(options.profile).name) / options.checkpoint
    model, tokenizer = load_model(str(folder), dtype="auto"), None
    if options.pre_tokenizer != "none":
        tokenizer = load_tokenizer(str(folder))
    path = folder.with_name(f"{folder.name}.gguf")
    write_gguf(model, path, tokenizer, pre_tokenizer=options.pre_tokenizer if tokenizer else None)
    print(f"Written: {path} ({path.stat().st_size / 1e6:.0f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
