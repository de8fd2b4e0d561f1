"""python -m slimllm_nb.comparison: compare methods, print the tables, leave rows.csv and picture.png."""

import argparse
import sys
from pathlib import Path

from slimllm_nb.command import command
from slimllm_nb.comparison.compare import compare, comparison_folder
from slimllm_nb.files import replacing, write_text
from slimllm_nb.methods import load_file, method_names
from slimllm_nb.reproduce.profiles import load_profile


def method_of(text: str) -> str | dict:
    """ "flap", or a method with parts changed: "flap+recovery=ridge", "channel_score=mine" (of SlimLLM)."""
    if "=" not in text:
        return text
    pieces = text.split("+")
    base = "slimllm" if "=" in pieces[0] else pieces.pop(0)
    return {"base": base, "name": text, **dict(piece.split("=", 1) for piece in pieces)}


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slimllm_nb.comparison", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--methods",
        default="slimllm,flap,obs_ridge",
        help=f"by comma: {', '.join(method_names())}, or one with parts changed: flap+recovery=ridge",
    )
    parser.add_argument("--parts", help="a Python file of your own that registers parts or methods")
    parser.add_argument("--profile", default="embedded", help="a name of data/profiles, or a .yaml file of your own")
    parser.add_argument("--settings", help="by comma: the profile's keys, such as 20,50 (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="how many draws of calibration samples (default: 5)")
    parser.add_argument("--samples", type=int, help="calibration samples (default: the profile's)")
    parser.add_argument("--generated", type=int, default=0, help="so many of them the model's own text (default: 0)")
    options = parser.parse_args(arguments)
    profile = load_profile(options.profile)
    if options.parts:
        load_file(Path(options.parts))
    found = compare(
        [method_of(text.strip()) for text in options.methods.split(",")],
        options.settings.split(",") if options.settings else None,
        options.seeds,
        profile=profile,
        num_samples=options.samples,
        generated=options.generated,
    )
    folder = comparison_folder(profile.name)
    write_text(folder / "rows.csv", found.frame.to_csv(index=False))
    with replacing(folder / "picture.png") as partial:
        partial.write_bytes(found.plot().png())
    print(found)
    print(f"Rows: {folder / 'rows.csv'}; picture: {folder / 'picture.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
