"""The paper's claims and published numbers, as data/paper holds them: claims.yaml, and tables whose rows become claims.

A run compares three things with a row of a table: perplexity on a corpus (column `<corpus>_ppl`), zero-shot accuracy on
a task (column of its name, in percent) and their `average`; and the share of the parameters that is removed. Each
number has the tolerance of its kind. Fine-tuned rows are notebook 09's, "not run" unless it trains. Where the paper has
no row for a model, every verdict says so.
"""

import csv
import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from slimllm_nb.files import ROOT
from slimllm_nb.reproduce.claim import Claim, Claims, PaperError, Tolerance, Tolerances
from slimllm_nb.reproduce.profiles import Profile
from slimllm_nb.settings import read_validated

if TYPE_CHECKING:  # pandas takes seconds to import, which would be spent on finding that nothing is to do
    import pandas

PAPER = ROOT / "data" / "paper"
CLAIMS = PAPER / "claims.yaml"
NOTEBOOK, TUNED = "06_evaluation", "09_fine_tuning"  # where published numbers are judged
NO_ROW = "no published row for this model"
NAMES = {"wikitext2": "WikiText-2", "ptb": "PTB", "average": "the average of all tasks"}


@cache
def tolerances() -> dict[str, Tolerance]:
    """By kind of metric: perplexity, accuracy, average, parameters."""
    return read_validated(PAPER / "tolerances.yaml", Tolerances, PaperError).root


def load_claims(notebook: str, profile: Profile) -> list[Claim]:
    """The claims that this notebook judges under this profile: those of claims.yaml in its order, then the numbers that
    the paper publishes for the profile's model. Raises: PaperError for a table or a row that is not there."""
    claims = [*read_validated(CLAIMS, Claims, PaperError).root, *published_claims(profile)]
    claims = [one for one in claims if one.profiles is None or profile.name in one.profiles]
    return [one for one in claims if one.notebook == notebook]


def published(table: str) -> "pandas.DataFrame":
    """A table of the paper as published, e.g. "table1_llama7b", or a CSV file by its path. Raises: PaperError for an
    unknown one."""
    import pandas

    return pandas.read_csv(_table(table))


def _table(name: str) -> Path:
    path = Path(name) if name.endswith(".csv") else PAPER / f"{name}.csv"
    if not path.is_file():
        allowed = ", ".join(sorted(one.stem for one in PAPER.glob("*.csv")))
        raise PaperError(f"no published table {name!r}; allowed: {allowed}, or the path of a .csv file")
    return path


def published_rows(table: str) -> list[dict[str, str]]:
    """Of a table, top to bottom, without pandas."""
    with _table(table).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def published_claims(profile: Profile) -> Iterator[Claim]:
    """The numbers that the paper publishes for the profile's model, or that it publishes none. Raises: PaperError for a
    table or a row that is not there."""
    if profile.model == "embedded":
        return
    if profile.published is None:
        yield from _without_rows(profile)
        return
    rows = published_rows(profile.published.table)
    dense = _row(rows, profile, "0", "no", profile.published.dense)
    yield from _row_claims(profile, rows, dense, "dense", "of the dense model", expected=True)
    if profile.published.latency:
        yield from _speed_claims(profile)
    for percent in profile.settings:
        row = _row(rows, profile, percent, "no", profile.published.method)
        yield from _row_claims(profile, rows, row, percent, f"at {percent} %", expected=True)
        if removed := profile.published.parameters_removed.get(percent):
            yield make_claim(
                profile,
                f"{percent}-parameters",
                f"The {percent} % setting removes the published share of the model's parameters",
                f"{100 * removed:.1f} %",
                f"model_share_removed_{percent}",
                removed,
                "parameters",
                expected=True,
                cell=_latency_cell(profile, percent, "params"),
            )
        if tuned := [one for one in rows if _is(one, percent, "yes", profile.published.method)]:
            where = f"at {percent} %, fine-tuned"
            yield from _row_claims(profile, rows, tuned[0], f"{percent}-tuned", where, expected=False)


def _speed_claims(profile: Profile) -> Iterator[Claim]:
    """How much faster than the dense model: the ratio is judged, since the paper's card was another one."""
    seconds = {row["ratio"]: row for row in published_rows(profile.published.latency.table)}
    what = {"prefill": "To the first token", "decoding": "Generating"}
    for percent, (name, told) in itertools.product(profile.settings, what.items()):
        dense, pruned = (float(seconds[f"{key}%"][f"{name}_s"]) for key in ("0", percent))
        claim = f"{told}, the {percent} % model is as much faster than the dense one as the paper's"
        paper = f"{dense / pruned:.2f} times ({dense:g} s, {pruned:g} s)"
        left = f"speedup_{name}_{percent}"
        cell = _latency_cell(profile, percent, f"{name}_s")
        yield make_claim(profile, f"{percent}-{name}", claim, paper, left, dense / pruned, "speedup", cell=cell)


def _latency_cell(profile: Profile, percent: str, column: str) -> tuple[str, int, str] | None:
    if profile.published.latency is None:
        return None
    table = profile.published.latency.table
    return table, [row["ratio"] for row in published_rows(table)].index(f"{percent}%"), column


def _row_claims(
    profile: Profile, rows: list[dict[str, str]], row: dict[str, str], key: str, where: str, expected: bool
) -> Iterator[Claim]:
    for column, text in row.items():
        if column in ("ratio_percent", "tuned", "method") or not text:
            continue
        kind, what = _described(column)
        value = float(text) if kind == "perplexity" else float(text) / 100
        claim = f"{what} {where} is the published one"
        cell = profile.published.table, rows.index(row), column
        yield make_claim(profile, f"{key}-{column}", claim, text, metric(key, column), value, kind, expected, cell)


def _described(column: str) -> tuple[str, str]:
    """The kind of tolerance of a table's column, and what it holds in words."""
    name = column.removesuffix("_ppl")
    if name != column:
        return "perplexity", f"Perplexity on {NAMES.get(name, name)}"
    return "average" if column == "average" else "accuracy", f"Zero-shot accuracy, {NAMES.get(name, name)},"


def metric(key: str, column: str) -> str:
    """The name under which a notebook saves the number of a table's column; key: "dense", "20" or "20-tuned"."""
    key = key.replace("-", "_")
    if column.endswith("_ppl"):
        model = key if key == "dense" else f"{key.removesuffix('_tuned')}_slimllm"
        return f"ppl_{model}{'_tuned' if key.endswith('_tuned') else ''}_{column.removesuffix('_ppl')}"
    return f"acc_{key}_{column}"


def _without_rows(profile: Profile) -> Iterator[Claim]:
    tasks = [*profile.zeroshot.tasks, "average"] if profile.zeroshot else []
    columns = [f"{corpus}_ppl" for corpus in profile.evaluation.corpora] + tasks
    for key in ("dense", *profile.settings):
        where = "of the dense model" if key == "dense" else f"at {key} %"
        for column in columns:
            kind, what = _described(column)
            yield make_claim(profile, f"{key}-{column}", f"{what} {where}", NO_ROW, metric(key, column), None, kind)


def make_claim(
    profile: Profile,
    name: str,
    claim: str,
    paper: str,
    left: str,
    right: float | None,
    kind: str,
    expected: bool = False,
    cell: tuple[str, int, str] | None = None,
    **where: str,
) -> Claim:
    """That `left` is the published number `right`, within the tolerance of its kind. where: another notebook or source
    than those of the profile's own rows."""
    place = {"notebook": TUNED if "_tuned" in left else NOTEBOOK}
    place["source"] = profile.published.source if profile.published else "-"
    return Claim(
        id=f"{profile.name}-{name}",
        claim=claim,
        paper=paper,
        kind="check" if right is None else "published",
        left=left,
        right=right,
        relation="within",
        cell=cell,
        **tolerances()[kind].model_dump(exclude={"why"}),
        expected=[profile.name] if expected else [],
        **place | where,
    )


def _is(row: dict[str, str], percent: str, tuned: str, method: str) -> bool:
    return (row["ratio_percent"], row["tuned"], row["method"]) == (percent, tuned, method)


def _row(rows: list[dict[str, str]], profile: Profile, percent: str, tuned: str, method: str) -> dict[str, str]:
    for row in rows:
        if _is(row, percent, tuned, method):
            return row
    raise PaperError(f"{profile.published.table} has no row of {method!r} at {percent} % (tuned: {tuned})")
