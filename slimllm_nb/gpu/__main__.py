"""What a GPU proves, without the internet: make gpu, or python -m slimllm_nb.gpu [--parts equal,large] [--small]

equal       heads and channels that every method keeps, on the CPU and twice on the GPU, small models
embedded    the embedded model at both settings in three dtypes: what is kept, perplexity against data/results
notebooks   00 to 06 on the GPU, through papermill where it is installed, else their cells one after the other
large       random weights in LLaMA-7B's shape: forward pass, prune() by four methods, bit for bit twice, memory
disk        prune_checkpoint() of eight such layers with 6 GiB of the GPU
speed       prefill and decoding of that shape, dense and pruned by 20 and 50 % (paper Table 3), widths in multiples
training    LoRA on that shape, pruned by 20 %: tokens per second, memory

A line of JSON for every part, and all of it in data/gpu/<card>.json, which docs/results.md shows (make results). A part
that fails does not stop the others; parts measured by the same versions and commit stay. --small: tiny shapes.
"""

import argparse
import json
import platform
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from slimllm_nb.command import command
from slimllm_nb.devices import device_name, find_device, nvidia_card
from slimllm_nb.files import ROOT, commit, write_text
from slimllm_nb.gpu.parts import Asked, disk, embedded, equal, large, notebooks, release, speed, training

PARTS = {one.__name__: one for one in (equal, embedded, notebooks, large, disk, speed, training)}


def machine(device: torch.device) -> dict:
    """What the figures belong to."""
    free, total = torch.accelerator.get_memory_info(device)
    return {
        "card": device_name(device),
        "driver": card[1] if (card := nvidia_card()) else None,
        "GB": round(total / 1e9, 1),
        "free GB": round(free / 1e9, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
        | {"transformers": transformers.__version__},
        "commit": commit(),
    }


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slimllm_nb.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"default: {','.join(PARTS)}")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the program")
    parser.add_argument("--folder", type=Path, default=ROOT / "data" / "gpu", help="where the figures are kept")
    parser.add_argument("--notebooks", type=Path, default=ROOT / "notebooks", help="what the part of this name runs")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts.split(",")) - PARTS.keys():
        raise ValueError(f"--parts: {', '.join(sorted(unknown))}; allowed: {', '.join(PARTS)}")
    device = find_device("auto")
    if device.type == "cpu":
        raise ValueError("PyTorch finds no GPU that it can use: there is nothing to prove")
    known = machine(device)
    path = options.folder / f"{re.sub(r'[^a-z0-9]+', '-', known['card'].lower())}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    same = all(before.get(key) == known[key] for key in ("versions", "commit"))
    content = known | {"small": options.small, "parts": before["parts"] if same and before else {}}
    asked = Asked(device, options.small, options.notebooks)
    for name in options.parts.split(","):
        start = time.perf_counter()
        try:
            found = PARTS[name](asked)
        except Exception as error:  # whatever it is, it is what this card proves
            found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        found = {"seconds in all": round(time.perf_counter() - start, 1), **found}
        release()
        print(json.dumps({name: found}), flush=True)
        content |= {"date": datetime.now(UTC).date().isoformat(), "parts": content["parts"] | {name: found}}
        write_text(path, json.dumps(content, indent=1) + "\n")
    return 1 if any("failed" in found for found in content["parts"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
