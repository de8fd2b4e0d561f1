"""What pruning costs in time and memory, beside what it cannot cost less than: make bench [PARTS=prune,layer,...]

Every part is measured in one run, alternating with what it is compared with, and kept in runs/bench.json as soon as it
is there; a part that is there is not measured again. `--keep` copies that file to data/bench.json, from which `make
results` writes its table.

prune       prune() of the embedded model, 32 x 128 tokens, over one forward pass through its decoder
layer       one layer of LLaMA-7B's shape: all that pruning does beyond the layer's own forward pass
literal     the same layer by the tests' literal version of the method (the authors' loops): about 20 minutes
growth      seconds and peak memory of pruning some layers with 32, 128 and 512 samples

Pruning from disk is measured by `make gpu`.
"""

import argparse
import ctypes
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from results import BENCH
from slimllm_nb import calibration
from slimllm_nb.files import ROOT, write_text
from slimllm_nb.generated import windows
from slimllm_nb.methods import as_method
from slimllm_nb.pruning import prune, sublayers
from slimllm_nb.pruning.budget import Plan
from slimllm_nb.pruning.layer import prune_layer
from slimllm_nb.pruning.sublayers import Settings
from slimllm_nb.reproduce.profiles import load_profile, run_folder
from slimllm_nb.sources import load_model, load_texts, load_tokenizer

RUNS = run_folder("embedded").parent / "bench.json"
SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}  # LLaMA-7B
SAMPLES, LENGTH, BATCH, RATIO = 32, 128, 8, 0.25
REPEATS, LAYER_REPEATS = 5, 5
GROWTH_LAYERS = 6


def ratio(values: list[float]) -> dict:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def settings() -> dict:
    """Of the embedded profile's mildest setting."""
    profile = load_profile("embedded")
    return profile.settings[profile.mildest].amount | {"progress": False}


def embedded_case(num_samples: int) -> tuple[LlamaForCausalLM, torch.Tensor]:
    profile = load_profile("embedded")
    model, tokenizer = load_model(profile.model), load_tokenizer(profile.model)
    texts = load_texts("news", "calibration") + load_texts("wikipedia", "calibration")
    return model, windows(texts, tokenizer, num_samples, LENGTH, seed=0)


# prune: what one forward pass through the decoder takes is the unit.


@torch.no_grad()
def part_prune() -> dict:
    model, ids = embedded_case(SAMPLES)

    def forward() -> None:
        for batch in ids.split(BATCH):
            model.model(batch, use_cache=False)

    amount = settings()

    def pruned() -> None:
        prune(model, ids, **amount)

    forward()  # the first of a process also ask the system for memory
    pruned()
    units, stored, streamed = [], [], []
    for _ in range(REPEATS):
        units.append(seconds(forward))
        stored.append(seconds(pruned) / units[-1])
        with mock.patch.object(sublayers, "activation_limit", lambda layer: 0):
            streamed.append(seconds(pruned) / units[-1])
    return {
        "forward_seconds": ratio(units),
        "prune_over_forward": ratio(stored),
        "streamed_over_forward": ratio(streamed),
    }


# layer, literal: one layer of the 7B shape.


def wide_case() -> tuple[torch.nn.Module, torch.Tensor, Callable[[torch.Tensor], dict]]:
    """Random weights as LLaMA starts from, random hidden states."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=1, vocab_size=32)).eval().requires_grad_(False)
    hidden = torch.randn(SAMPLES, LENGTH, SHAPE["hidden_size"])
    context = calibration.layer_context(model, hidden[:BATCH])
    return model.model.layers[0], hidden, lambda _: context


def pruned_layer(layer, hidden, context, index: int = 0) -> dict:
    """The report's lines; `hidden` is overwritten with the layer's output."""
    plan, settings = Plan(RATIO, torch.full((GROWTH_LAYERS, 2), RATIO)), Settings(as_method("slimllm"))
    return prune_layer(layer, hidden.split(BATCH), context, plan, None, index, settings)[0]["report"]


@torch.no_grad()
def part_layer() -> dict:
    layer, hidden, context = wide_case()

    def forward() -> None:
        for batch in hidden.split(BATCH):
            layer(batch, **context(batch))

    forward()
    units, beyond = [], []
    for _ in range(LAYER_REPEATS):
        units.append(seconds(forward))
        beyond.append(seconds(lambda: pruned_layer(layer, hidden.clone(), context)) - units[-1])
    over = [one / unit for one, unit in zip(beyond, units, strict=True)]
    return {"forward_seconds": ratio(units), "beyond_seconds": ratio(beyond), "layer7b_over_forward": ratio(over)}


@torch.no_grad()
def part_literal() -> dict:
    """The literal version gets the activations for nothing; what it is compared with is all beyond the forward pass."""
    sys.path.insert(0, str(ROOT / "tests"))
    import literal

    layer, hidden, context = wide_case()
    attention, mlp = layer.self_attn, layer.mlp
    unit = seconds(lambda: [layer(batch, **context(batch)) for batch in hidden.split(BATCH)])
    start = time.perf_counter()
    ours = pruned_layer(layer, hidden.clone(), context)
    beyond = time.perf_counter() - start - unit

    x = torch.cat([calibration.head_inputs(layer, batch, context(batch)) for batch in hidden.split(BATCH)])
    number = round(RATIO * SHAPE["num_attention_heads"])
    found = {}

    def heads() -> None:
        p = literal.contributions(x, attention.o_proj.weight)
        found["heads"] = literal.literal_select(p, number, greedy=True)

    spent = {"heads": seconds(heads)}
    columns = torch.tensor(
        [head * attention.head_dim + i for head in found["heads"] for i in range(attention.head_dim)]
    )
    flat, weight = x.flatten(1), attention.o_proj.weight
    recovered = {}

    def fit_heads() -> None:
        recovered["weight"], recovered["bias"] = literal.literal_regression(flat, weight, columns.tolist())

    spent["regression of the heads"] = seconds(fit_heads)
    after = hidden + (flat[:, columns] @ recovered["weight"].T + recovered["bias"]).view_as(hidden)
    inputs = calibration.mlp_inputs(layer, after)
    activations = calibration.mlp_activations(layer, inputs)
    weights = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight

    def channels() -> None:
        importance = literal.literal_channels(inputs, activations, *weights)
        found["channels"] = literal.literal_keep_lowest(importance, RATIO, 0.01)

    spent["channels"] = seconds(channels)
    spent["regression of the channels"] = seconds(
        lambda: literal.literal_regression(activations, mlp.down_proj.weight, found["channels"])
    )
    return {
        "literal_seconds": spent,
        "beyond_seconds": beyond,
        "layer7b_speedup_over_literal": sum(spent.values()) / beyond,
        "same_heads": ours["kept_heads"] == found["heads"],
        "same_channels": ours["kept_channels"] == found["channels"],
    }


# growth: memory, in a process of its own.


def seconds_and_peak(run: Callable[[], object]) -> tuple[float, int]:
    """And how many bytes this process's resident memory rises meanwhile: Linux keeps the highest (proc(5), VmHWM)."""

    def held(name: str) -> int:
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")  # from here on
    before = held("VmRSS")
    spent = seconds(run)
    return spent, held("VmHWM") - before


@torch.no_grad()
def measure_growth(num_samples: int) -> dict:
    """The first layers, one after the other; what they leave is not kept, so that the pruned model hides nothing."""
    model, ids = embedded_case(num_samples)
    context = partial(calibration.layer_context, model)

    def run(hidden: torch.Tensor) -> None:
        for index, layer in enumerate(model.model.layers[:GROWTH_LAYERS]):
            pruned_layer(layer, hidden, context, index)

    run(calibration.embed(model, ids[:BATCH]))  # what is allocated once and for all
    hidden = calibration.embed(model, ids)
    ctypes.CDLL(None).malloc_trim(0)
    spent, peak = seconds_and_peak(lambda: run(hidden))
    # What enters stands there already; what a half gives needs as much again.
    return {"seconds": spent, "peak": peak, "hidden_states": hidden.nbytes}


def part_growth() -> dict:
    found = {}
    # What is freed goes back to the system at once, or nobody could see what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
    for number in (32, 128, 512):
        command = [sys.executable, __file__, "--growth", str(number)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found[number] = json.loads(done.stdout)
    beyond = {number: one["peak"] - one["hidden_states"] for number, one in found.items()}
    return {
        "seconds_per_sample": {number: one["seconds"] / number for number, one in found.items()},
        "peak_beyond_hidden_states": beyond,
        "peak_growth_32_to_512": beyond[512] / beyond[32] - 1,
    }


PARTS = {"prune": part_prune, "layer": part_layer, "literal": part_literal, "growth": part_growth}


def machine() -> dict:
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return {
        "processor": f"{os.cpu_count()} cores of {found[1] if found else platform.processor()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "versions": {package: version(package) for package in ("torch", "transformers")},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="by comma (default: all)")
    parser.add_argument("--again", action="store_true", help="measure parts that are there, too")
    parser.add_argument("--keep", action="store_true", help="copy what was measured to data/bench.json")
    parser.add_argument("--growth", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.growth:
        print(json.dumps(measure_growth(options.growth)))
        return 0
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; allowed: {', '.join(PARTS)}")
    known = json.loads(RUNS.read_text(encoding="utf-8")) if RUNS.is_file() else {}
    for name in parts:
        if options.again or known.get("machine") != machine() or name not in known:
            print(f"{name} ...", flush=True)
            known = (known if known.get("machine") == machine() else {"machine": machine()}) | {name: PARTS[name]()}
            write_text(RUNS, json.dumps(known, indent=1) + "\n")
        print(f"{name}: {json.dumps(known[name], indent=1)}", flush=True)
    if options.keep:
        write_text(BENCH, RUNS.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
