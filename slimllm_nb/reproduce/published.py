"""The paper's rows for a profile's model, as claims: one for every number, each with the tolerance of its kind.

A run compares three things with a row: perplexity on a corpus (column `<corpus>_ppl`), zero-shot accuracy on a task
(column of its name, in percent) and their `average`; and the share of the parameters that is gone. What was fine-tuned
is not measured here, so it stays "not run". Where the paper has no row for a model, every verdict says so.
"""

import csv
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pydantic import RootModel

from slimllm_nb.files import ROOT
from slimllm_nb.reproduce.profiles import Profile
from slimllm_nb.settings import Settings, read_validated

PAPER = ROOT / "data" / "paper"
NOTEBOOK = "06_evaluation"
NO_ROW = "no published row for this model"
NAMES = {"wikitext2": "WikiText-2", "ptb": "PTB", "average": "the average of all tasks"}


class PaperError(ValueError):
    """A table that does not exist, an invalid claims.yaml, or a metric that is not a finite number."""


class Tolerance(Settings):
    """Relative (margin) or in the metric's own unit (absolute), and why."""

    margin: float | None = None
    absolute: float | None = None
    why: str


class _Tolerances(RootModel):
    root: dict[str, Tolerance]


@cache
def tolerances() -> dict[str, Tolerance]:
    """By kind of metric: perplexity, accuracy, average, parameters."""
    return read_validated(PAPER / "tolerances.yaml", _Tolerances, PaperError).root


def published_fields(profile: Profile) -> Iterator[dict]:
    """The fields of a Claim for every number that the paper publishes for this profile.

    Raises: PaperError for a table or a row that is not there.
    """
    if profile.model == "embedded":
        return
    if profile.published is None:
        yield from _without_rows(profile)
        return
    rows = _read_rows(profile.published.table)
    dense = _row(rows, profile, "0", "no", profile.published.dense)
    yield from _row_claims(profile, dense, "dense", "of the dense model", expected=True)
    for percent in profile.settings:
        row = _row(rows, profile, percent, "no", profile.published.method)
        yield from _row_claims(profile, row, percent, f"at {percent} %", expected=True)
        if percent in profile.published.parameters_removed:
            removed = profile.published.parameters_removed[percent]
            yield _claim(
                profile,
                f"{percent}-parameters",
                f"The {percent} % setting removes the published share of the model's parameters",
                f"{100 * removed:.1f} %",
                f"model_share_removed_{percent}",
                removed,
                "parameters",
                True,
            )
        if tuned := [one for one in rows if _is(one, percent, "yes", profile.published.method)]:
            yield from _row_claims(profile, tuned[0], f"{percent}-tuned", f"at {percent} %, fine-tuned", expected=False)


def _row_claims(profile: Profile, row: dict[str, str], key: str, where: str, expected: bool) -> Iterator[dict]:
    for column, text in row.items():
        if column in ("ratio_percent", "tuned", "method") or not text:
            continue
        kind, what = _described(column)
        value = float(text) if kind == "perplexity" else float(text) / 100
        claim = f"{what} {where} is the published one"
        yield _claim(profile, f"{key}-{column}", claim, text, metric(key, column), value, kind, expected)


def _described(column: str) -> tuple[str, str]:
    """The kind of tolerance of a table's column, and what it holds in words."""
    name = column.removesuffix("_ppl")
    if name != column:
        return "perplexity", f"Perplexity on {NAMES.get(name, name)}"
    return "average" if column == "average" else "accuracy", f"Zero-shot accuracy, {NAMES.get(name, name)},"


def metric(key: str, column: str) -> str:
    """The name under which notebook 06 saves the number of a table's column; key: "dense", "20" or "20-tuned"."""
    key = key.replace("-", "_")
    if column.endswith("_ppl"):
        model = key if key == "dense" else f"{key.removesuffix('_tuned')}_slimllm"
        return f"ppl_{model}{'_tuned' if key.endswith('_tuned') else ''}_{column.removesuffix('_ppl')}"
    return f"acc_{key}_{column}"


def _without_rows(profile: Profile) -> Iterator[dict]:
    tasks = [*profile.zeroshot.tasks, "average"] if profile.zeroshot else []
    columns = [f"{corpus}_ppl" for corpus in profile.evaluation.corpora] + tasks
    for key in ("dense", *profile.settings):
        where = "of the dense model" if key == "dense" else f"at {key} %"
        for column in columns:
            kind, what = _described(column)
            yield _claim(profile, f"{key}-{column}", f"{what} {where}", NO_ROW, metric(key, column), None, kind, False)


def _claim(profile, name, claim, paper, left, right, kind, expected) -> dict:
    tolerance = tolerances()[kind]
    return {
        "id": f"{profile.name}-{name}",
        "notebook": NOTEBOOK,
        "claim": claim,
        "source": profile.published.source if profile.published else "-",
        "paper": paper,
        "left": left,
        "right": right,
        "relation": "within",
        "margin": tolerance.margin,
        "absolute": tolerance.absolute,
        "expected": [profile.name] if expected else [],
    }


def _read_rows(table: str) -> list[dict[str, str]]:
    """A table of data/paper by its name, or a CSV file by its path."""
    path = Path(table) if table.endswith(".csv") else PAPER / f"{table}.csv"
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return list(csv.DictReader(stream))
    except OSError as error:
        allowed = ", ".join(sorted(one.stem for one in PAPER.glob("*.csv")))
        raise PaperError(f"no published table {path}; allowed: {allowed}, or the path of a .csv file") from error


def _is(row: dict[str, str], percent: str, tuned: str, method: str) -> bool:
    return (row["ratio_percent"], row["tuned"], row["method"]) == (percent, tuned, method)


def _row(rows: list[dict[str, str]], profile: Profile, percent: str, tuned: str, method: str) -> dict[str, str]:
    for row in rows:
        if _is(row, percent, tuned, method):
            return row
    raise PaperError(f"{profile.published.table} has no row of {method!r} at {percent} % (tuned: {tuned})")
