"""Write the GGUF file of a checkpoint of this project, beside it: tools/write_gguf.py [--pre-tokenizer NAME] FOLDER"""

import argparse
import sys
from pathlib import Path

from slimllm_nb.gguf_file import write_gguf
from slimllm_nb.sources import SourceError, load_model, load_tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/write_gguf.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a checkpoint; `make reproduce` leaves some in runs/<profile>/")
    parser.add_argument(
        "--pre-tokenizer",
        default="smollm",
        help="llama.cpp's name for how text is cut (default: smollm)",
    )
    options = parser.parse_args()
    try:
        model, tokenizer = load_model(str(options.folder)), load_tokenizer(str(options.folder))
        path = options.folder.with_name(f"{options.folder.name}.gguf")
        write_gguf(model, path, tokenizer, pre_tokenizer=options.pre_tokenizer)
    except (SourceError, ValueError) as error:
        print(f"Nothing was written: {error}", file=sys.stderr)
        return 2
    print(f"Written: {path} ({path.stat().st_size / 1e6:.0f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
