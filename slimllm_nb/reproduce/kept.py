"""What takes too long to run along, kept as data with the commit and the date that measured it."""

import json
from typing import TYPE_CHECKING

from slimllm_nb.files import ROOT
from slimllm_nb.reproduce.profiles import Profile, run_folder
from slimllm_nb.reproduce.verdicts import Verdict, judge

if TYPE_CHECKING:
    import pandas

RESULTS = ROOT / "data" / "results"
ZEROSHOT = ROOT / "data" / "zeroshot"


def kept_results(profile: str) -> tuple[dict[str, dict[str, float]], str] | None:
    """The metrics of a profile's notebooks, and when they were measured; None: not kept (`make reference` does)."""
    path = RESULTS / f"{profile}.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["metrics"], f"at commit {content['commit']} on {content['date']}"


def scoreboard(profile: Profile) -> tuple[list[Verdict], str]:
    """A verdict on every claim from the kept results of this profile, and when they were measured. Where nothing is
    kept, what comes from a run was not run."""
    metrics, when = kept_results(profile.name) or ({}, "never: run make reproduce, then make reference")
    names = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    return [one for name in names for one in judge(name, metrics.get(name, {}), profile)], when


def dense_zeroshot(profile: Profile) -> "pandas.DataFrame | None":
    """The dense model's zero-shot table that the dense gate left in this profile's run folder; None: it did not run."""
    import pandas

    path = run_folder(profile.name) / "dense.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["zeroshot"] if path.is_file() else []
    return pandas.DataFrame(rows) if rows else None


def kept_zeroshot(profile: str) -> "tuple[pandas.DataFrame, str] | None":
    """Zero-shot accuracies of a profile's models on all questions, and when they were measured; None: not kept.

    Rows: model ("dense" or a setting), parameters, task, metric, accuracy, standard error, chance, questions. They are
    measured by `make zeroshot` and kept by `make reference`.
    """
    import pandas

    path = ZEROSHOT / f"{profile}.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return pandas.DataFrame(content["rows"]), f"at commit {content['commit']} on {content['date']}"
