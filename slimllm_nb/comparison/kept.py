"""What data/ablations keeps of the sweep: rows with the commit and the date that measured them.

An edit of the code does not make them stale: a test and notebook 07 measure one again and say how far it is off.
"""

import json
import os
import platform
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from slimllm_nb.comparison.compare import Bench
from slimllm_nb.comparison.plan import PLAN, Group, group_and_bench, load_plan
from slimllm_nb.comparison.protocol import Protocol
from slimllm_nb.comparison.table import Comparison, Row, mean_and_change
from slimllm_nb.fingerprint import PACKAGES, digest
from slimllm_nb.methods import Method, PartError, as_method
from slimllm_nb.reproduce.differences import BASELINE, kept_file
from slimllm_nb.reproduce.profiles import load_profile


@dataclass
class Kept:
    """The kept rows of a profile, by group."""

    groups: dict[str, Comparison]
    questions: dict[str, str]
    methods: dict[str, list]  # as the plan had them

    @property
    def rows(self) -> list[Row]:
        return [row for group in self.groups.values() for row in group.rows]

    def joined(self, *names: str) -> Comparison:
        """These groups as one, each row once. Raises: KeyError for a group that is not kept, ValueError for groups that
        were not measured under one protocol."""
        groups = [self.groups[name] for name in names]
        first = groups[0]
        for name, one in zip(names, groups, strict=True):
            if one.protocol != first.protocol:
                raise ValueError(f"group {name} has another protocol than {names[0]}: they cannot be joined")
        rows = {(row.setting, row.seed, row.method): row for one in groups for row in one.rows}
        return Comparison(first.protocol, first.dense, list(rows.values()))

    def beside(self, lines: Mapping[str, tuple[str, str, str | None]]) -> pd.DataFrame:
        """Rows of several groups, each beside the one that it is compared with: by setting and label, for every corpus
        the mean perplexity and its change against another label's, seed by seed.

        lines: label -> group, method, and that other label; its own, or None: it is compared with none.
        """
        found, shown = {}, {}
        for label, (group, method, _) in lines.items():
            for row in self.groups[group].rows:
                if row.method == method:
                    found.setdefault((row.setting, label), {})[row.seed] = row.perplexity
        for (setting, label), own in found.items():
            other = lines[label][2]
            against = {} if other == label else found.get((setting, other), {})
            both = own.keys() & against.keys()
            shown[setting, label] = {
                corpus: mean_and_change(
                    [one[corpus] for one in own.values()],
                    [own[seed][corpus] / against[seed][corpus] for seed in both],
                )
                for corpus in next(iter(own.values()))
            }
        frame = pd.DataFrame.from_dict(shown, orient="index")
        return frame.sort_index(level=0, sort_remaining=False, kind="stable")

    def __str__(self) -> str:
        """How many rows, and when they were measured."""
        when = sorted({(row.date or "?", row.commit or "?") for row in self.rows})
        return f"{len(self.rows)} rows, measured " + ", ".join(f"at commit {one} on {day}" for day, one in when)


def kept_ablations(profile: str = "embedded", kept: Path | None = None) -> Kept | None:
    """What data/ablations/<profile>.json holds; None: nothing is kept."""
    path = kept or kept_file(profile)
    if not path.is_file():
        return None
    groups = json.loads(path.read_text(encoding="utf-8"))["groups"]
    found = {
        name: Comparison(
            Protocol.model_validate(one["protocol"]),
            Row.model_validate(one["dense"]),
            [Row.model_validate(row) for row in one["rows"]],
        )
        for name, one in groups.items()
    }
    questions, methods = ({name: one[what] for name, one in groups.items()} for what in ("question", "methods"))
    return Kept(found, questions, methods)


def usable(kept: Kept | None, group: Group, bench: Bench) -> list[Row]:
    """What is kept of a group that the plan still asks for: under the same protocol, by methods of the same parts."""
    before = kept and kept.groups.get(group.name)
    if not before or before.protocol != bench.protocol:
        return []
    wanted = {name: digest(parts=method.identity) for name, method in group.named_methods().items()}
    same = {BASELINE}
    for one in kept.methods[group.name]:
        with suppress(PartError):  # a part that there is no more
            method = as_method(one)
            same |= {method.name} if wanted.get(method.name) == digest(parts=method.identity) else set()
    return [row for row in before.rows if row.method in same & wanted.keys()]


def collect(profile: str, plan: Path = PLAN, kept: Path | None = None, again: Collection[str] = ()) -> dict:
    """What is kept and what was measured of the plan, as it is kept: groups with protocol, dense row and rows. again:
    groups whose kept rows are replaced where they were measured anew."""
    found, former = {}, kept_ablations(profile, kept)
    for name in load_plan(plan):
        group, bench = group_and_bench(profile, plan, name)
        before, methods = usable(former, group, bench), group.named_methods()
        cells = [(key, seed) for seed in range(group.seeds) for key in bench.profile.settings]
        rows = [row for cell in cells for row in _cell(bench, methods, cell, before, name in again)]
        if rows:
            known = former and former.groups.get(name)
            found[name] = {
                "question": group.question,
                "protocol": bench.protocol.model_dump(mode="json"),
                "methods": group.methods,
                "dense": (known.dense if known and before else bench.dense()).model_dump(),
                "rows": [row.model_dump() for row in rows],
            }
    return {
        "profile": load_profile(profile).model_dump(mode="json"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {package: version(package) for package in PACKAGES},
        "groups": found,
    }


def of_cell(rows: list[Row], key: str, seed: int) -> dict[str, Row]:
    """Those of a setting and seed, by method."""
    return {row.method: row for row in rows if (row.setting, row.seed) == (key, seed)}


def _cell(bench: Bench, methods: dict[str, Method], cell: tuple[str, int], before: list[Row], again: bool) -> list[Row]:
    """The rows that share setting and seed: all of the group's methods, or those that were kept, so that the methods of
    a table have the same seeds."""
    kept = of_cell(before, *cell)
    rows = list(bench.rows_of_seed(methods, *cell, {} if again else kept, measure=False))
    return rows if len(rows) == len(methods) else list(kept.values())


def dumped(content: dict) -> str:
    """JSON with a line for every row."""
    groups = {
        name: group | {"rows": [f"<{name} {number}>" for number in range(len(group["rows"]))]}
        for name, group in content["groups"].items()
    }
    text = json.dumps(content | {"groups": groups}, indent=1, ensure_ascii=False)
    for name, group in content["groups"].items():
        for number, row in enumerate(group["rows"]):
            text = text.replace(json.dumps(f"<{name} {number}>"), json.dumps(row), 1)
    return text + "\n"
