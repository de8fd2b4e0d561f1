"""What the programs beside this file share: methods side by side at equal size, and a file that grows seed by seed."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from slimllm_nb import evaluation, pruning
from slimllm_nb.files import commit, write_text
from slimllm_nb.methods import MethodLike
from slimllm_nb.progress import bar
from slimllm_nb.reproduce.setting import Setting


def side_by_side(
    model,
    setting: Setting,
    samples: Tensor,
    similarity: Tensor,
    methods: Iterable[tuple[str, MethodLike]],
    blocks: dict,
) -> dict[str, dict[str, float]]:
    """Perplexities by method and corpus, and the share of the decoder that is left: the first method takes the
    setting's own amount, the others leave as many parameters."""
    amount, found = setting.amount, {}
    for name, method in methods:
        pruned, report = pruning.prune(model, samples, **amount, method=method, similarity=similarity, progress=False)
        amount = {"target_parameters": report.decoder.share_left, "target_of": "decoder", **setting.spread}
        found[name] = {at: evaluation.perplexity(pruned, some, progress=False) for at, some in blocks.items()}
        found[name]["decoder_share"] = report.decoder.share_left
    return found


def measure_seeds(path: Path, seeds: int, setting: str, measured: Callable[[int], dict], **asked: str) -> None:
    """Add a row for each seed to the file, but for those of this setting, and of all that is asked, that it has."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    for seed in bar(range(seeds), desc="seeds"):
        wanted = {"setting": setting, "seed": seed, **asked}
        if any(all(row[name] == value for name, value in wanted.items()) for row in rows):
            continue
        rows.append(wanted | measured(seed))
        print(json.dumps(rows[-1]), flush=True)
        write_text(path, json.dumps({"commit": commit(), "rows": rows}, indent=1) + "\n")
