"""A verdict on each claim of the paper from what was measured here.

A number of the paper is only ever shown as the paper's, a measured one as ours, and what was not run says so.
"""

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slimllm_nb.files import write_text
from slimllm_nb.reproduce.claims import Claim, PaperError, load_claims
from slimllm_nb.reproduce.differences import Difference, kept_difference
from slimllm_nb.reproduce.profiles import Profile, run_folder

if TYPE_CHECKING:
    import pandas

HOLDS, FAILS, CLOSE, NOT_RUN = "holds", "does not hold", "inconclusive", "not run"
AGREES, DIFFERS = "one seed: agrees", "one seed: differs"  # with the claim, see Claim.one_seed
NOT_PUBLISHED = "nothing published"
KINDS = (HOLDS, FAILS, AGREES, DIFFERS, CLOSE, NOT_PUBLISHED, NOT_RUN)
TITLES = {
    "published": "What the paper publishes",
    "identity": "What holds by construction",
    "check": "Checks of our own",
}
WIDTHS = {"claim": 44, "paper": 26, "measured": 18, "tolerance": 16, "verdict": 17}


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
    difference: Difference | None = None  # of methods, over seeds
    method: str = ""  # whose perplexity it is that differs from SlimLLM's
    cell: tuple[str, int, str] | None = None  # of the paper's tables: file, row, column
    kind: str = "published"  # a key of TITLES
    dense_off: bool = False  # the dense model was not the published one, and the run was told to go on (dense.py)

    @property
    def fails_run(self) -> bool:
        """Expected to hold for this profile, and it was not shown to."""
        return self.expected and self.verdict not in (HOLDS, AGREES)

    @property
    def measured(self) -> str:
        if self.difference is not None:
            return f"{self.method}: {self.difference}, {self.difference.seeds} seeds"
        if self.left is None or (self.compared and self.right is None):
            return "-"
        return f"{self.left:.4g} against {self.right:.4g}" if self.compared else f"{self.left:.4g}"


def judge(notebook: str, metrics: dict[str, float], profile: Profile) -> list[Verdict]:
    """A verdict on each claim that belongs to the notebook under this profile.

    A metric that is missing: not run. One that is NaN or infinite was run, and its claim does not hold. Where the dense
    model was measured before (dense.json in the run folder) and is not the published one, each verdict is marked.
    """
    return judge_claims(load_claims(notebook, profile), metrics, profile)


def judge_claims(claims: Sequence[Claim], metrics: dict[str, float], profile: Profile) -> list[Verdict]:
    """The same for claims that were loaded already."""
    off = dense_is_off(run_folder(profile.name))
    return [_verdict(claim, metrics, profile.name, off) for claim in claims]


def dense_is_off(folder: Path) -> bool:
    """Whether the dense model of this run folder was measured and found to differ from the published one."""
    try:
        return bool(json.loads((folder / "dense.json").read_text(encoding="utf-8"))["off"])
    except FileNotFoundError:
        return False


def _verdict(claim: Claim, metrics: dict[str, float], profile: str, off: bool = False) -> Verdict:
    compared, left, right, found = isinstance(claim.right, str), None, None, None
    if claim.swept is not None:  # about methods: from the sweep that is kept for this profile
        found = kept_difference(profile, **claim.swept.model_dump(exclude={"lower"}))
        claimed = -1 if claim.swept.lower else 1
        kind = NOT_RUN if found is None else {1: HOLDS, -1: FAILS, 0: CLOSE}[claimed * found.sign]
    else:
        left = metrics.get(claim.left)
        right = metrics.get(claim.right) if compared else claim.right
        kind = _kind(claim, left, right)
    return Verdict(
        **claim.model_dump(include={"id", "notebook", "kind", "claim", "source", "paper", "cell"}),
        tolerance=claim.tolerance,
        verdict=kind,
        expected=profile in claim.expected,
        left=left,
        right=right,
        compared=compared,
        difference=found,
        method="" if claim.swept is None else claim.swept.group if claim.swept.against else claim.swept.method,
        dense_off=off,
    )


def _kind(claim: Claim, left: float | None, right: float | None) -> str:
    if left is not None and claim.right is None:
        return NOT_PUBLISHED
    return NOT_RUN if left is None or right is None else _compare(claim, float(left), float(right))


def _compare(claim: Claim, left: float, right: float) -> str:
    if not (math.isfinite(left) and math.isfinite(right)):
        return FAILS
    allowed = claim.absolute if claim.absolute is not None else claim.margin * abs(right)
    if claim.relation == "within":
        return HOLDS if abs(left - right) <= allowed else FAILS
    lead = right - left if claim.relation == "less" else left - right
    holds, fails = (AGREES, DIFFERS) if claim.one_seed else (HOLDS, FAILS)
    if lead > allowed:
        return holds
    return fails if lead < -allowed or allowed == 0 else CLOSE


def by_kind(verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    """The verdicts under a title for each kind of claim, what the paper publishes first: they are never mixed."""
    found = {title: [one for one in verdicts if one.kind == kind] for kind, title in TITLES.items()}
    return {title: some for title, some in found.items() if some}


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
        "verdict": verdict.verdict + (" (dense model off)" if verdict.dense_off else ""),
    }


def verdict_table(verdicts: Sequence[Verdict]) -> "pandas.DataFrame":
    """The verdicts with the measured values, one row per claim."""
    import pandas

    return pandas.DataFrame([row(verdict) for verdict in verdicts], columns=list(WIDTHS))


def save_results(
    folder: str | Path, notebook: str, metrics: dict[str, float], verdicts: Sequence[Verdict], *, profile: str
) -> Path:
    """Write folder/results/<notebook>.json, whole or not at all; returns its path.

    Raises: PaperError naming the first metric that is not a finite number; nothing is written then.
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


def read_result(folder: Path, notebook: str, profile: str) -> dict[str, float]:
    """The metrics that a notebook left; PaperError when its result is missing, is none, or belongs to another one."""
    path = folder / "results" / f"{notebook}.json"
    if not path.is_file():
        raise PaperError(f"{notebook} ran to its end, but wrote no result: {path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, metrics = (content["notebook"], content["profile"]), content["metrics"]
        if found != (notebook, profile):
            raise PaperError(f"{path} belongs to {found}, expected {(notebook, profile)}")
        if not metrics or not all(math.isfinite(value) for value in metrics.values()):
            raise PaperError(f"{path} holds no metrics, or some that are not finite numbers: {metrics}")
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise PaperError(f"{path} is not a result file: {error!r}") from error
    return metrics
