"""What takes too long to run along, kept as data with a digest of the code that made it."""

import json
from typing import TYPE_CHECKING

from slimllm_nb.files import ROOT
from slimllm_nb.reproduce.profiles import Profile, run_folder
from slimllm_nb.reproduce.stamps import code_digest

if TYPE_CHECKING:
    import pandas

ZEROSHOT = ROOT / "data" / "zeroshot"
# What decides which weights go, and which answers are right.
DECIDING = ("calibration", "evaluation.zeroshot", "pruning", "sources.texts")


def current_code() -> str:
    """SHA-256 over the code that zero-shot accuracies depend on, and the task files."""
    return code_digest(DECIDING)


def dense_zeroshot(profile: Profile) -> "pandas.DataFrame | None":
    """The dense model's zero-shot table that the dense gate left in this profile's run folder; None: it did not run."""
    import pandas

    path = run_folder(profile.name) / "dense.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["zeroshot"] if path.is_file() else []
    return pandas.DataFrame(rows) if rows else None


def kept_zeroshot(profile: str) -> "tuple[pandas.DataFrame, bool] | None":
    """Zero-shot accuracies of a profile's models on all questions, and whether today's code made them; None: not kept.

    Rows: model ("dense" or a setting), parameters, task, metric, accuracy, standard error, chance, questions. They are
    measured by `make zeroshot` and kept by `make reference`.
    """
    import pandas

    path = ZEROSHOT / f"{profile}.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return pandas.DataFrame(content["rows"]), content.get("code") == current_code()
