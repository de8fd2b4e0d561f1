"""What follows from measured rows: means, deviations, and differences from SlimLLM seed by seed."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pydantic import BaseModel

from slimllm_nb.comparison.protocol import Protocol
from slimllm_nb.reproduce.differences import BASELINE, Difference, difference

if TYPE_CHECKING:
    from slimllm_nb.plots import Picture

VERDICTS = {1: "higher", -1: "lower", 0: "inconclusive"}


class Row(BaseModel):
    """One method at one setting with one seed. accuracy: zero-shot, by task, where a group asks for it. Seconds: of the
    pruning, with similarities where it asks for them, and of the training. commit, date, machine: with what, when and
    where it was measured."""

    method: str
    setting: str = ""
    seed: int = 0
    perplexity: dict[str, float]
    accuracy: dict[str, float] = {}
    decoder_parameters: int
    decoder_share: float
    model_parameters: int
    model_share: float
    seconds: float = 0.0
    commit: str | None = None
    date: str | None = None
    machine: str | None = None

    @property
    def average(self) -> float:
        """Accuracy, mean over tasks."""
        return np.mean(list(self.accuracy.values()))


@dataclass
class Comparison:
    """Rows of methods that were compared under one protocol; SlimLLM's are among them."""

    protocol: Protocol
    dense: Row
    rows: list[Row]
    reference: str = BASELINE

    @property
    def frame(self) -> pd.DataFrame:
        """A line for every row and corpus, and whether the samples come from that corpus."""
        return pd.DataFrame(
            row.model_dump(exclude={"perplexity", "accuracy", "commit", "date", "machine"})
            | {"corpus": corpus, "calibrated": self.protocol.calibrated(corpus), "perplexity": value}
            for row in self.rows
            for corpus, value in row.perplexity.items()
        )

    def summary(self) -> pd.DataFrame:
        """For every setting and method: seeds, mean and deviation of the perplexity on every corpus, decoder and model
        parameters, and the seconds of the fastest seed (the others waited for something else that the machine did).
        The deviation is that of a sample (n - 1); NaN with one seed."""
        groups = self.frame.groupby(["setting", "method"], sort=False)
        found = groups.agg(
            seeds=("seed", "nunique"),
            decoder_parameters=("decoder_parameters", "mean"),
            decoder_share=("decoder_share", "mean"),
            model_parameters=("model_parameters", "mean"),
            seconds=("seconds", "min"),
        )
        spread = self.frame.pivot_table(
            index=["setting", "method"], columns="corpus", values="perplexity", aggfunc=["mean", "std"], sort=False
        ).reindex(found.index)
        for corpus in self.protocol.judge_on:
            found[f"{corpus} mean"] = spread["mean"][corpus]
            found[f"{corpus} std"] = spread["std"][corpus] if "std" in spread else np.nan
        return found

    def differences(self) -> pd.DataFrame:
        """Perplexity over SlimLLM's with the same seed, for every setting, method and corpus: the geometric mean over
        seeds as a change in percent, its 95 % interval (Student's t over the logarithms), and a verdict in a word.

        "inconclusive": the interval contains 0, or there is one seed.
        """
        wide = self.frame.pivot(index=["setting", "corpus", "seed"], columns="method", values="perplexity")
        ratios = wide.div(wide[self.reference], axis=0)
        lines = []
        methods = [name for name in dict.fromkeys(row.method for row in self.rows) if name != self.reference]
        for setting in dict.fromkeys(row.setting for row in self.rows):
            for method in methods:
                for corpus in self.protocol.judge_on:
                    measured = ratios.loc[(setting, corpus), method].dropna()
                    if measured.empty:  # this method has no rows at this setting
                        continue
                    found = difference(measured)
                    line = {"setting": setting, "method": method, "corpus": corpus, **asdict(found)}
                    lines.append(line | {"verdict": VERDICTS[found.sign]})
        columns = ["setting", "method", "corpus", "seeds", "change", "low", "high", "verdict"]
        return pd.DataFrame(lines, columns=columns).set_index(columns[:3])

    def table(self) -> pd.DataFrame:
        """The summary as it is read: mean ± deviation, a corpus that the samples come from with a star."""
        summary, shown = self.summary(), {}
        for corpus in self.protocol.judge_on:
            pairs = zip(summary[f"{corpus} mean"], summary[f"{corpus} std"], strict=True)
            shown[self._heading(corpus)] = [
                _number(mean) + ("" if np.isnan(std) else f" ± {_number(std)}") for mean, std in pairs
            ]
        shown["decoder left"] = [f"{share:.1%}" for share in summary.decoder_share]
        shown["model parameters"] = [f"{count:,.0f}" for count in summary.model_parameters]
        shown["seconds"] = [f"{seconds:.0f}" for seconds in summary.seconds]
        return pd.DataFrame(shown, index=summary.index)

    def changes(self) -> pd.DataFrame:
        """The differences as they are read: change [interval], a column for every corpus."""
        found = self.differences()
        cells = {key: told(line) for key, line in found.iterrows()}
        index = list(dict.fromkeys(key[:2] for key in found.index))
        shown = {self._heading(corpus): [cells[(*key, corpus)] for key in index] for corpus in self.protocol.judge_on}
        return pd.DataFrame(shown, index=pd.MultiIndex.from_tuples(index, names=["setting", "method"]))

    def _heading(self, corpus: str) -> str:
        return f"{corpus} *" if self.protocol.calibrated(corpus) else corpus

    @property
    def dense_line(self) -> str:
        """The dense model's perplexities in a few words."""
        return "Dense: " + ", ".join(f"{corpus} {value:.1f}" for corpus, value in self.dense.perplexity.items()) + "."

    def plot(self) -> "Picture":
        """Perplexity over SlimLLM's: mean and 95 % interval for every method, setting and corpus."""
        from slimllm_nb import plots

        found = self.differences().reset_index()
        panels = {
            f"{setting} % setting": {
                corpus: {
                    line.method: tuple(1 + np.array([line.change, line.low, line.high]) / 100)
                    for line in found[(found.setting == setting) & (found.corpus == corpus)].itertuples()
                }
                for corpus in self.protocol.judge_on
            }
            for setting in dict.fromkeys(found.setting)
        }
        seeds = int(self.summary().seeds.min())
        spread = "one seed" if seeds == 1 else f"mean of {seeds} seeds, 95 % interval"
        return plots.ratio_intervals(
            panels, f"Perplexity over SlimLLM's at equal decoder parameters: {spread}", "perplexity / SlimLLM's"
        )

    def curve(self, accuracy: bool = False) -> "Picture":
        """Perplexity over the dense model's (geometric mean over corpora and seeds), or zero-shot accuracy (mean over
        tasks and seeds), against the share of the decoder that is pruned: a point for each setting, and the lowest and
        the highest seed."""
        from slimllm_nb import plots

        def value(row: Row) -> float:
            if accuracy:
                return row.average
            return np.mean([np.log(one / self.dense.perplexity[corpus]) for corpus, one in row.perplexity.items()])

        rows = pd.DataFrame(
            [(row.method, row.setting, row.seed, 1 - row.decoder_share, value(row)) for row in self.rows],
            columns=["method", "setting", "seed", "pruned", "value"],
        )
        points = rows.groupby(["method", "setting"], sort=False).value.agg(["mean", "min", "max"])
        points = points if accuracy else np.exp(points)
        methods = {method: points.loc[method] for method in dict.fromkeys(rows.method)}
        count = len(self.dense.accuracy) if accuracy else len(self.protocol.judge_on)
        seeds = "one seed" if (number := rows.seed.nunique()) == 1 else f"{number} seeds, lowest and highest seed"
        return plots.curves(
            100 * rows.groupby("setting", sort=False).pruned.mean(),
            {method: found["mean"] for method, found in methods.items()},
            f"What size costs: mean of {count} {'tasks' if accuracy else 'corpora'} and {seeds}",
            "share of the decoder's parameters pruned, in percent",
            "zero-shot accuracy" if accuracy else "perplexity / the dense model's",
            logy=not accuracy,
            reference={"dense": value(self.dense)} if accuracy else None,
            spread={
                method: [found["mean"] - found["min"], found["max"] - found["mean"]]
                for method, found in methods.items()
            },
        )

    def __str__(self) -> str:
        changes = self.changes()
        lines = [
            f"Perplexity, mean ± standard deviation over seeds; {self.protocol.num_samples} calibration samples of "
            f"{self.protocol.length} tokens. {self.dense_line}",
            self.table().to_string(),
        ]
        if len(changes):
            lines += [
                "",
                "Change against SlimLLM with the same seed: geometric mean [95 % interval]; an interval that contains "
                "0 is inconclusive.",
                changes.to_string(),
            ]
        stars = [corpus for corpus in self.protocol.judge_on if self.protocol.calibrated(corpus)]
        if stars:
            lines.append(f"* calibrated on other documents of the corpus it is measured on: {', '.join(stars)}")
        return "\n".join(lines)


def told(line: pd.Series) -> str:
    """A line of Comparison.differences in a few characters: change [interval]."""
    return str(Difference(line.change, line.low, line.high, line.seeds))


def mean_and_change(values: Sequence[float], ratios: Sequence[float]) -> str:
    """The mean; and, where there are ratios to another's, seed by seed, the change with its interval."""
    shown = f"{np.mean(values):.1f}"
    return f"{shown}, {difference(ratios)}" if len(ratios) else shown


def _number(value: float) -> str:
    """Three or four digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"
