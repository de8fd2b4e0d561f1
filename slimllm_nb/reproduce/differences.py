"""Differences between methods over seeds, from the sweep that data/ablations keeps; light, for verdicts.

comparison/ablations.py measures the rows; here they are read, and a difference gets its interval.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slimllm_nb.files import ROOT

KEPT = ROOT / "data" / "ablations"
BASELINE = "slimllm"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Perplexity against another's with the same seed: the geometric mean over seeds as a change in percent, and the
    interval of that mean (NaN with one seed)."""

    change: float
    low: float
    high: float
    seeds: int

    @property
    def sign(self) -> int:
        """1: higher, -1: lower, 0: the interval contains 0, or there is one seed: inconclusive."""
        return (self.low > 0) - (self.high < 0)

    def __str__(self) -> str:
        return f"{percent(self.change)} %" + (
            "" if math.isnan(self.low) else f" [{percent(self.low)}, {percent(self.high)}]"
        )


def percent(value: float) -> str:
    """+12.3, +1,234"""
    return f"{value:+,.0f}" if abs(value) >= 100 else f"{value:+.1f}"


def difference(ratios: Sequence[float]) -> Difference:
    """From one ratio of perplexities for every seed: Student's t over their logarithms."""
    from scipy import stats  # a second to import

    logs = [math.log(ratio) for ratio in ratios]
    count = len(logs)
    mean = sum(logs) / count
    half = math.nan
    if count > 1:
        deviation = math.sqrt(sum((one - mean) ** 2 for one in logs) / (count - 1))
        half = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * deviation / math.sqrt(count)
    change, low, high = (100 * math.expm1(one) for one in (mean, mean - half, mean + half))
    return Difference(change, low, high, count)


def kept_difference(
    profile: str, group: str, setting: str, method: str, against: str | None = None
) -> Difference | None:
    """A method's perplexity in a group of the kept sweep, at a setting, against SlimLLM's in that group or in the group
    `against`, which may have another protocol: per seed the geometric mean over all corpora. None: not kept."""
    path = kept_file(profile)
    if not path.is_file():
        return None
    groups = json.loads(path.read_text(encoding="utf-8"))["groups"]
    means = _means(groups, group, setting, method)
    others = _means(groups, against or group, setting, BASELINE)
    ratios = [means[seed] / others[seed] for seed in sorted(means.keys() & others.keys())]
    return difference(ratios) if ratios else None


def _means(groups: dict, group: str, setting: str, method: str) -> dict[int, float]:
    """By seed: a method's geometric mean over all corpora."""
    rows = groups.get(group, {"rows": []})["rows"]
    return {
        row["seed"]: _geometric_mean(row["perplexity"].values())
        for row in rows
        if (row["setting"], row["method"]) == (setting, method)
    }


def kept_file(profile: str) -> Path:
    """Of a profile by its name, or by its file."""
    return KEPT / f"{Path(profile).stem if profile.endswith('.yaml') else profile}.json"


def _geometric_mean(values) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))
