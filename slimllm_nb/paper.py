"""The paper's published numbers and its claims, and a verdict on each claim from what was measured here.

A number of the paper is only ever shown as the paper's, a measured one as ours, and what was not run says so.
"""

import json
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, model_validator

from slimllm_nb.profiles import ROOT, read_validated

if TYPE_CHECKING:  # pandas takes seconds to import, which the runner would spend on finding that nothing is to do
    import pandas

PAPER = ROOT / "data" / "paper"
CLAIMS = PAPER / "claims.yaml"

HOLDS, FAILS, CLOSE, NOT_RUN = "holds", "does not hold", "too close to call", "not run"
WIDTHS = {"claim": 44, "paper": 26, "measured": 18, "tolerance": 16, "verdict": 17}


class PaperError(ValueError):
    """A table that does not exist, an invalid claims.yaml, or a metric that is not a finite number."""


class Claim(BaseModel):
    """One claim of the paper and how it is measured: `left` is less than, more than or within a tolerance of `right`.

    margin: relative to |right|. For less and more, what is closer than that is too close to call; for within, it is
    the tolerance, unless `absolute` gives one in the metric's own unit.
    profiles: those it applies to (None: all); expected: those whose run fails when it does not hold.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    notebook: str
    claim: str
    source: str
    paper: str
    left: str
    right: str | float
    relation: Literal["less", "more", "within"]
    margin: float | None = Field(default=None, ge=0)
    absolute: float | None = Field(default=None, ge=0)
    profiles: list[str] | None = None
    expected: list[str] = []

    @model_validator(mode="after")
    def _one_tolerance(self):
        if (self.margin is None) == (self.absolute is None):
            raise ValueError("give either margin (relative) or absolute")
        if self.profiles is not None and not set(self.expected) <= set(self.profiles):
            raise ValueError("expected names a profile that profiles does not")
        return self

    @property
    def tolerance(self) -> str:
        """As it is printed: the same on every machine."""
        size = f"{self.absolute:g}" if self.margin is None else f"{100 * self.margin:g} %"
        if not self.margin and not self.absolute:
            return "exact" if self.relation == "within" else self.relation
        return f"± {size}" if self.relation == "within" else f"{self.relation} by {size}"


class _Claims(RootModel):
    root: list[Claim]

    @model_validator(mode="after")
    def _unique(self):
        ids = [claim.id for claim in self.root]
        if twice := sorted({name for name in ids if ids.count(name) > 1}):
            raise ValueError(f"these ids occur twice: {', '.join(twice)}")
        return self


@dataclass(frozen=True)
class Verdict:
    """What came out for one claim. `left` and `right` are the measured values, None where there is none."""

    id: str
    notebook: str
    claim: str
    source: str
    paper: str
    tolerance: str
    verdict: str
    expected: bool
    left: float | None
    right: float | None
    compared: bool  # right was measured too, not a number of the claim

    @property
    def fails_run(self) -> bool:
        """Expected to hold for this profile, and it was not shown to."""
        return self.expected and self.verdict != HOLDS

    @property
    def measured(self) -> str:
        if self.left is None or self.right is None:
            return "-"
        return f"{self.left:.4g} against {self.right:.4g}" if self.compared else f"{self.left:.4g}"


def published(table: str) -> "pandas.DataFrame":
    """A table of the paper as published, e.g. "table1_llama7b"; PaperError for an unknown one."""
    import pandas

    allowed = sorted(path.stem for path in PAPER.glob("*.csv"))
    if table not in allowed:
        raise PaperError(f"unknown table {table!r}; allowed: {', '.join(allowed)}")
    return pandas.read_csv(PAPER / f"{table}.csv")


def load_claims(notebook: str, profile: str) -> list[Claim]:
    """The claims that this notebook judges under this profile, in the order of claims.yaml."""
    claims = read_validated(CLAIMS, _Claims, PaperError).root
    return [one for one in claims if one.notebook == notebook and (one.profiles is None or profile in one.profiles)]


def judge(notebook: str, metrics: dict[str, float], profile: str) -> list[Verdict]:
    """A verdict on each claim that belongs to the notebook under this profile.

    A metric that is missing: not run. One that is NaN or infinite was run, and its claim does not hold.
    """
    return [_verdict(claim, metrics, profile) for claim in load_claims(notebook, profile)]


def _verdict(claim: Claim, metrics: dict[str, float], profile: str) -> Verdict:
    compared = isinstance(claim.right, str)
    left = metrics.get(claim.left)
    right = metrics.get(claim.right) if compared else claim.right
    return Verdict(
        **claim.model_dump(include={"id", "notebook", "claim", "source", "paper"}),
        tolerance=claim.tolerance,
        verdict=NOT_RUN if left is None or right is None else _compare(claim, float(left), float(right)),
        expected=profile in claim.expected,
        left=left,
        right=right,
        compared=compared,
    )


def _compare(claim: Claim, left: float, right: float) -> str:
    if not (math.isfinite(left) and math.isfinite(right)):
        return FAILS
    allowed = claim.absolute if claim.absolute is not None else claim.margin * abs(right)
    if claim.relation == "within":
        return HOLDS if abs(left - right) <= allowed else FAILS
    lead = right - left if claim.relation == "less" else left - right
    if lead > allowed:
        return HOLDS
    return FAILS if lead < -allowed or allowed == 0 else CLOSE


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Print claim, paper, tolerance and verdict: what is the same on every machine, so without the measured value."""
    print(text_table(verdicts, ["claim", "paper", "tolerance", "verdict"]))


def text_table(verdicts: Sequence[Verdict], columns: Sequence[str]) -> str:
    """The verdicts as a table of plain text; each column (a key of WIDTHS) is wrapped to its width."""
    if not verdicts:
        return "no claim of the paper is judged here"
    rule = "-+-".join("-" * WIDTHS[column] for column in columns)
    lines = [" | ".join(column.ljust(WIDTHS[column]) for column in columns).rstrip()]
    for verdict in verdicts:
        cells = [textwrap.wrap(row(verdict)[column], WIDTHS[column]) for column in columns]
        lines.append(rule)
        for index in range(max(map(len, cells))):
            parts = [cell[index] if index < len(cell) else "" for cell in cells]
            padded = [part.ljust(WIDTHS[column]) for part, column in zip(parts, columns, strict=True)]
            lines.append(" | ".join(padded).rstrip())
    return "\n".join(lines)


def row(verdict: Verdict) -> dict[str, str]:
    """A verdict as it is shown, by the columns of WIDTHS."""
    return {
        "claim": verdict.claim,
        "paper": f"{verdict.source}: {verdict.paper}",
        "measured": verdict.measured,
        "tolerance": verdict.tolerance,
        "verdict": verdict.verdict,
    }


def verdict_table(verdicts: Sequence[Verdict]) -> "pandas.DataFrame":
    """The verdicts with the measured values, one row per claim."""
    import pandas

    return pandas.DataFrame([row(verdict) for verdict in verdicts], columns=list(WIDTHS))


def save_results(
    folder: str | Path, notebook: str, metrics: dict[str, float], verdicts: Sequence[Verdict], *, profile: str
) -> Path:
    """Write folder/results/<notebook>.json, whole or not at all; returns its path.

    Errors: PaperError naming the first metric that is not a finite number; nothing is written then.
    """
    values = {}
    for name, value in metrics.items():
        values[name] = float(value)
        if not math.isfinite(values[name]):
            raise PaperError(f"metric {name} of {notebook} is {value}; only finite numbers are saved")
    content = {"notebook": notebook, "profile": profile, "metrics": values, "verdicts": [asdict(v) for v in verdicts]}
    path = Path(folder) / "results" / f"{notebook}.json"
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: a reader sees the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
