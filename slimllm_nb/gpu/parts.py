"""What is proven of a GPU, part by part: each gives figures, or raises."""

import gc
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slimllm_nb import calibration, evaluation, pruning, sources
from slimllm_nb.disk import prune_checkpoint
from slimllm_nb.evaluation.speed import FIRST_TOKEN, measure_speed
from slimllm_nb.files import ROOT
from slimllm_nb.methods import method_names
from slimllm_nb.recipe import Recipe
from slimllm_nb.reproduce.kept import kept_results
from slimllm_nb.reproduce.profiles import load_profile
from slimllm_nb.tuning import tune, tuning_bytes

TINY = {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "head_dim": 4}
TINY |= {"num_attention_heads": 8, "initializer_range": 0.15, "pad_token_id": 2}
TINY_RECIPE = Recipe(samples=8, held_out=4, batch_size=4, at_once=4, epochs=1, evaluations=1)
LIMIT = 6 << 30  # bytes of the GPU that pruning from disk may take
CELLS = """
import json, sys
names = {"__name__": "__main__", "display": print}
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        exec("".join(cell["source"]), names)
"""


@dataclass(frozen=True)
class Asked:
    """device: where it is proven. small: tiny shapes."""

    device: torch.device
    small: bool
    notebooks: Path

    def model(self, dtype: torch.dtype, layers: int | None = None) -> LlamaForCausalLM:
        """Random weights in the shape that LlamaConfig has by default, which is LLaMA-7B's."""
        shape = (TINY if self.small else {}) | ({} if layers is None else {"num_hidden_layers": layers})
        return random_model(shape, dtype, self.device)

    def samples(self) -> torch.Tensor:
        asked = load_profile("llama-7b-20").calibration
        length, vocabulary = (10, TINY["vocab_size"]) if self.small else (asked.length, LlamaConfig().vocab_size)
        return torch.randint(3, vocabulary, (asked.num_samples, length), generator=torch.Generator().manual_seed(0))

    def amount(self, percent: str) -> dict:
        """How much is pruned: as in Table 1 of the paper."""
        if self.small:
            return {"pruning_ratio": float(percent) / 100, "pruned_layers": 3, "alpha": 2.0}
        return load_profile(f"llama-7b-{percent}").settings[percent].amount


def random_model(shape: dict, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    torch.manual_seed(1)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=dtype)
    return model.eval().requires_grad_(False)


def kept(report) -> list[tuple]:
    return [(set(one.kept_heads), set(one.kept_channels)) for one in report.layers]


def shares(some: list[tuple], others: list[tuple]) -> dict[str, float]:
    """Of the heads and of the channels that others keep, how many are kept here as well."""
    pairs = list(zip(some, others, strict=True))
    return {
        name: sum(len(one[place] & other[place]) for one, other in pairs) / sum(len(other[place]) for _, other in pairs)
        for place, name in enumerate(("heads", "channels"))
    }


def measured(run: Callable[[], tuple]) -> tuple:
    """What run() gives, seconds, and the most GB of the device that lived meanwhile."""
    torch.accelerator.reset_peak_memory_stats()
    start = time.perf_counter()
    found = run()
    torch.accelerator.synchronize()
    peak = torch.accelerator.max_memory_allocated() / 1e9
    return found, {"seconds": round(time.perf_counter() - start, 2), "peak GB": float(f"{peak:.4g}")}


def equal(asked: Asked) -> dict:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # TF32, as NVIDIA's containers set it: pruning must not mind
    try:
        found = _equal(asked)
    finally:
        torch.set_float32_matmul_precision(before)
    return {"same heads and channels": sum(found.values()), "of": len(found)} | found


def _equal(asked: Asked) -> dict[str, bool]:
    found, samples = {}, torch.randint(3, 101, (20, 10), generator=torch.Generator().manual_seed(0))
    for name in method_names():
        for heads in (8, 2):
            model = random_model(TINY | {"num_key_value_heads": heads}, torch.float32, torch.device("cpu"))
            options = {"pruning_ratio": 0.4, "pruned_layers": 3, "alpha": 2.0, "method": name, "progress": False}
            places = "cpu", asked.device, asked.device
            first, *others = (kept(pruning.prune(model.to(one), samples, **options)[1]) for one in places)
            found[f"{name}, {heads} key/value heads"] = others == [first, first]
    return found


def embedded(asked: Asked) -> dict:
    profile, (metrics, _) = load_profile("embedded"), kept_results("embedded") or ({}, "")
    reference = metrics.get("06_evaluation", {})
    keys = [profile.mildest] if asked.small else list(profile.settings)
    whole = profile.calibration.num_samples, None, profile.evaluation.max_tokens
    samples, corpora, tokens = (2, 1, 256) if asked.small else whole
    tokenizer, texts = sources.load_tokenizer(), sources.load_texts(profile.calibration.corpus, "calibration")
    ids = calibration.draw_samples(texts, tokenizer, samples, profile.calibration.length, profile.seed)
    blocks = {
        corpus: evaluation.token_blocks(
            sources.load_texts(corpus, "held-out"), tokenizer, profile.evaluation.block_length, tokens
        )
        for corpus in profile.evaluation.corpora[:corpora]
    }

    def pruned(model: LlamaForCausalLM, key: str) -> tuple:
        return pruning.prune(model, ids, **profile.settings[key].amount, progress=False)

    model, found = sources.load_model(), {}
    here = {key: kept(pruned(model, key)[1]) for key in keys}
    for dtype in (torch.float32,) if asked.small else (torch.float32, torch.float16, torch.bfloat16):
        model = sources.load_model(dtype=dtype, device=str(asked.device))
        for key in keys:
            (smaller, report), line = measured(partial(pruned, model, key))
            line |= {f"share of the CPU's {name}": share for name, share in shares(kept(report), here[key]).items()}
            for corpus, one in blocks.items():
                line[f"perplexity, {corpus}"] = value = evaluation.perplexity(smaller, one, progress=False)
                if (expected := reference.get(f"ppl_{key}_slimllm_{corpus}")) and not asked.small:
                    line[f"off data/results, {corpus}"] = value / expected - 1
            found[f"{key} %, {str(dtype).removeprefix('torch.')}"] = line
    return found


def notebooks(asked: Asked) -> dict:
    found, how = {}, "papermill" if find_spec("papermill") else "its cells"
    with tempfile.TemporaryDirectory() as runs:
        there = {"SLIMLLM_NB_DEVICE": asked.device.type, "SLIMLLM_NB_RUNS": runs, "MPLBACKEND": "agg"}
        for path in (one for one in sorted(asked.notebooks.glob("*.ipynb")) if one.stem < "07"):
            start, run = time.perf_counter(), ["-c", CELLS, str(path)]
            if how == "papermill":
                run = ["-m", "papermill", "--no-progress-bar", str(path), f"{runs}/{path.name}"]
            options = {"env": os.environ | there, "cwd": ROOT, "capture_output": True, "text": True}
            done = subprocess.run([sys.executable, *run], **options)
            if done.returncode:
                raise RuntimeError(f"{path.name} ({how}): {done.stderr.strip().splitlines()[-1]}")
            found[path.stem] = {"seconds": round(time.perf_counter() - start, 1), "by": how}
    return found


def large(asked: Asked) -> dict:
    model, ids = asked.model(torch.float16), asked.samples()
    passes = [measured(partial(evaluation.perplexity, model, ids, progress=False)) for _ in range(4)]
    seconds = [line["seconds"] for _, line in passes]
    found = {"perplexity, tokens per second": round(ids.numel() / min(seconds)), "its seconds": seconds}
    weights = []
    for name in ("slimllm", "slimllm again", "obs_heads_ridge", "flap", "llm_pruner"):
        options = asked.amount("20") | {"method": name.removesuffix(" again"), "progress": False}
        (pruned, report), line = measured(partial(pruning.prune, model, ids, **options))
        spent = sum(one.seconds for one in report.layers)
        line |= {"seconds in layers": round(spent, 2), "seconds before them": round(report.seconds - spent, 2)}
        found[name] = line | {"decoder left": round(report.decoder.share_left, 4)}
        if name.startswith("slimllm"):
            weights.append({name: one.cpu() for name, one in pruned.state_dict().items()})
        del pruned
        release()
    found["bit for bit twice"] = all(torch.equal(one, weights[1][name]) for name, one in weights[0].items())
    return found


def disk(asked: Asked) -> dict:
    with tempfile.TemporaryDirectory() as place:
        asked.model(torch.float16, layers=4 if asked.small else 8).save_pretrained(f"{place}/source")
        release()
        words = {f"w{number}": number for number in range(TINY["vocab_size"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(f"{place}/source")
        amount = asked.amount("20") | {"pruned_layers": 3 if asked.small else 7, "progress": False}
        folders, device = (f"{place}/source", f"{place}/out"), str(asked.device)
        cuda = asked.device.type == "cuda"
        if cuda:
            torch.cuda.set_per_process_memory_fraction(LIMIT / torch.cuda.get_device_properties(0).total_memory)
        try:
            report, line = measured(partial(prune_checkpoint, *folders, asked.samples(), **amount, device=device))
        finally:  # the other parts need the whole card
            if cuda:
                torch.cuda.set_per_process_memory_fraction(1.0)
    return line | {"layers": len(report.layers), "limit GB": round(LIMIT / 1e9, 2) if cuda else None}


def speed(asked: Asked) -> dict:
    built, ids = {"dense": asked.model(torch.float16)}, asked.samples()
    for percent, multiple in itertools.product(("20", "50"), (1, 8 if asked.small else 64)):
        options = asked.amount(percent) | {"channel_multiple": multiple, "progress": False}
        name = f"{percent} %" if multiple == 1 else f"{percent} %, channels in multiples of {multiple}"
        built[name] = pruning.prune(built["dense"], ids, **options)[0]
        release()
    found, cases = {}, ((8, (2,), 4),) if asked.small else ((256, (1, 8), 12), (2000, (8,), 2))
    for length, sizes, new in cases:
        options = {"prompt_length": length, "batch_sizes": sizes, "new_tokens": new, "repeats": 1 if asked.small else 5}
        for row in measure_speed(built, **options, progress=False).itertuples():
            if new > 2 or row.measure == FIRST_TOKEN:
                found[f"{row.model}, batch {row.batch}, {length} tokens, {row.measure}"] = [row.median, row[-1]]
    return found


def training(asked: Asked) -> dict:
    """LoRA on that shape pruned by 20 %, widths as they come and in multiples: seconds, tokens, what it takes beside
    the model and what was said before."""
    found, dense, ids = {}, asked.model(torch.float16), asked.samples()
    length, recipe = (
        (10, TINY_RECIPE) if asked.small else (256, Recipe(samples=128, held_out=16, epochs=1, evaluations=1))
    )
    tokens = torch.randint(3, dense.config.vocab_size, (recipe.samples + recipe.held_out, length))
    for multiple in (1, 8 if asked.small else 64):
        model = pruning.prune(dense, ids, **asked.amount("20"), channel_multiple=multiple, progress=False)[0]
        torch.accelerator.reset_peak_memory_stats()
        before, said = torch.accelerator.max_memory_allocated(), tuning_bytes(model, recipe, length)
        run = partial(tune, model, [(one, one) for one in tokens], recipe=recipe, progress=False)
        (_, report), line = measured(run)
        line["GB beside the model"] = round(line.pop("peak GB") - before / 1e9, 2)
        line |= {"as estimated": round(said / 1e9, 2), "tokens per second": round(report.tokens / report.seconds)}
        found[f"channels in multiples of {multiple}"] = line
        del model
        release()
    return found


def release() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    torch.accelerator.empty_cache()
