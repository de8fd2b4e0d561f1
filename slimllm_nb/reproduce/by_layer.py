"""A profile without its notebooks, for a model that is larger than the machine: make reproduce OPTIONS=--by-layer, and
by itself where the GPU is too small for the notebooks.

The dense model's perplexities, every setting pruned by prune_checkpoint, the pruned ones' perplexities, and verdicts on
the claims that these numbers answer; whatever the number of layers, one of them is in memory. What is there is not
measured again. Zero-shot accuracy and speed need a whole model in memory: not run.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from slimllm_nb.files import write_text
from slimllm_nb.fingerprint import fingerprint
from slimllm_nb.reproduce.claims import NOTEBOOK
from slimllm_nb.reproduce.dense import ALLOW, line, load_inputs, not_as_published
from slimllm_nb.reproduce.profiles import Profile, own_files
from slimllm_nb.reproduce.setting import Setting
from slimllm_nb.reproduce.verdicts import WIDTHS, Verdict, judge, text_table

FILE = "by_layer.json"


def run(profile: Profile, folder: Path) -> list[Verdict]:
    """Measure what is not measured yet, write folder/by_layer.json, print and return the verdicts.

    Raises: SourceError and ValueError for what cannot be had or pruned, and for a dense model that is not the published
    one (see dense.py), unless ALLOW_DENSE_MISMATCH=1.
    """
    from slimllm_nb.disk import checkpoint_perplexity, prune_checkpoint
    from slimllm_nb.sources.checkpoints import checkpoint_folder

    _, input_ids, blocks = load_inputs(profile)
    source = checkpoint_folder(profile.model, profile.revision)
    place = {"dtype": profile.dtype, "device": profile.device}

    def perplexities(model: Path, key: str) -> dict[str, float]:
        found = checkpoint_perplexity(model, blocks, **place)
        shown = ", ".join(f"{value:.2f} on {corpus}" for corpus, value in found.items())
        print(f"{key}: perplexity {shown}", flush=True)
        return {f"ppl_{key}_{corpus}": value for corpus, value in found.items()}

    def pruned(key: str, setting: Setting) -> dict[str, float]:
        target = folder / setting.checkpoint
        arguments = setting.arguments | place | {"similarity": known.similarity()}
        report = prune_checkpoint(source, target, input_ids, **arguments, base_model=profile.model)
        if None not in (found := [layer.similarity for layer in report.layers]):  # the allocation asks for them
            known.keep(similarity=found)
        print(f"{key} %: {target}\n{report}", flush=True)
        left = {"decoder": report.decoder.share_left, "model": report.model.share_left}
        return {
            f"decoder_share_left_{key}_slimllm": left["decoder"],
            **{f"{part}_share_removed_{key}": 1 - share for part, share in left.items()},
            **perplexities(target, f"{key}_slimllm"),
        }

    known = _Known(folder / FILE, profile)
    metrics = known.get("dense", lambda: perplexities(source, "dense"))
    off = [line(one) for one in not_as_published(metrics, profile)]
    if off and os.environ.get(ALLOW) != "1":
        raise ValueError(
            f"nothing was pruned: the dense model is not the one that the paper measured ({'; '.join(off)}); mend the "
            f"profile, or set {ALLOW}=1 to go on all the same"
        )
    for key, setting in profile.settings.items():
        metrics |= known.get(key, lambda key=key, setting=setting: pruned(key, setting))
    verdicts = [one for one in judge(NOTEBOOK, metrics, profile) if one.left is not None]
    print(f"\n{text_table(verdicts, list(WIDTHS))}\n\nWritten: {folder / FILE}", flush=True)
    return verdicts


class _Known:
    """Metrics by setting, and the dense layers' similarities, in a file that is written as soon as some are there, and
    begun anew when code or profile are other ones."""

    def __init__(self, path: Path, profile: Profile):
        made_from = fingerprint(profile=profile, files=own_files(profile))
        self.path, self.content = path, {"made_from": made_from, "metrics": {}}
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["made_from"] == self.content["made_from"]:
                self.content = found

    def get(self, key: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        known = self.content["metrics"]
        if key not in known:
            known[key] = measure()
            self.keep()
        return dict(known[key])

    def keep(self, **more) -> None:
        """Write what there is, and more."""
        self.content |= more
        write_text(self.path, json.dumps(self.content, indent=1) + "\n")

    def similarity(self):
        """Of every dense layer, as the first setting found it; None: nothing is pruned yet."""
        import torch

        values = self.content.get("similarity")
        return None if values is None else torch.tensor(values, dtype=torch.float64)
