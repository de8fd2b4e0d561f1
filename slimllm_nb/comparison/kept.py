"""What is kept of the sweep: rows with the digest of what made them, and how many of them today's code would make."""

import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from slimllm_nb.comparison.compare import Bench
from slimllm_nb.comparison.identity import PACKAGES
from slimllm_nb.comparison.plan import PLAN, Task, group_and_bench, load_plan, tasks
from slimllm_nb.comparison.protocol import Protocol
from slimllm_nb.comparison.table import Comparison, Row
from slimllm_nb.reproduce.differences import REFERENCE, kept_file
from slimllm_nb.reproduce.profiles import load_profile


def collect(profile: str, plan: Path = PLAN, kept: Path | None = None) -> dict:
    """What was measured of the plan, as it is kept: groups with protocol, dense row and rows.

    What is not measured yet is as it was kept before under the same protocol, so that a sweep that was stopped loses
    nothing; those rows' digests tell them apart.
    """
    found, former = {}, kept_ablations(profile, plan, kept)
    for name in load_plan(plan):
        group, bench = group_and_bench(profile, plan, name)
        before, methods = former and former.groups.get(name), group.named_methods()
        if before and before.protocol != bench.protocol:
            before = None
        rows, measured = [], False
        for task in tasks(profile, plan, [name]):
            known = _known(task)
            measured |= bool(known)
            rows += known or [
                row
                for row in (before.rows if before else [])
                if (row.setting, row.seed) == (task.setting, task.seed) and row.method in methods
            ]
        if rows:
            protocol = bench.protocol.model_dump(mode="json")
            found[name] = {
                "question": group.question,
                "protocol": protocol,
                "dense": (bench.dense() if measured else before.dense).model_dump(),
                "rows": [row.model_dump() for row in rows],
            }
    return {
        "profile": load_profile(profile).model_dump(mode="json"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {package: version(package) for package in PACKAGES},
        "groups": found,
    }


def _known(task: Task) -> list[Row]:
    """The rows of a task, where all of them are measured already: else the methods of a table would not have
    the same seeds."""
    group, bench = group_and_bench(task.profile, task.plan, task.group)
    share, rows = None, []
    for method in group.named_methods().values():
        row = bench.found(method, task.setting, task.seed, share)
        if row is None:
            return []
        share = row.decoder_share if share is None else share
        rows.append(row)
    return rows


def restore(profile: str, plan: Path = PLAN, kept: Path | None = None) -> None:
    """Put the kept rows where a sweep finds those that are measured already. Those that today's code would not make are
    never asked for."""
    found = kept_ablations(profile, plan, kept)
    for group in found.groups.values() if found else ():
        bench = Bench(load_profile(profile), group.protocol)
        for row in (group.dense, *group.rows):
            bench.keep(row.made_by, lambda row=row: row)


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


@dataclass
class Kept:
    """The kept rows of a profile, by group; `current`: how many of `total` today's code would measure the same way."""

    groups: dict[str, Comparison]
    questions: dict[str, str]
    current: int
    total: int

    def joined(self, *names: str) -> Comparison:
        """These groups as one, each row once. Errors: KeyError for a group that is not kept, ValueError for groups that
        were not measured under one protocol."""
        groups = [self.groups[name] for name in names]
        first = groups[0]
        for name, one in zip(names, groups, strict=True):
            if one.protocol != first.protocol:
                raise ValueError(f"group {name} has another protocol than {names[0]}: they cannot be joined")
        rows = {(row.setting, row.seed, row.method): row for one in groups for row in one.rows}
        return Comparison(first.protocol, first.dense, list(rows.values()))


def kept_ablations(profile: str = "embedded", plan: Path = PLAN, kept: Path | None = None) -> Kept | None:
    """What data/ablations/<profile>.json holds; None: nothing is kept."""
    path = kept or kept_file(profile)
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    groups, current, total = {}, 0, 0
    for name, one in content["groups"].items():
        rows = [Row.model_validate(row) for row in one["rows"]]
        protocol = Protocol.model_validate(one["protocol"])
        groups[name] = Comparison(protocol, Row.model_validate(one["dense"]), rows)
        current, total = current + _current(profile, plan, name, rows), total + len(rows)
    return Kept(groups, {name: one["question"] for name, one in content["groups"].items()}, current, total)


def _current(profile: str, plan: Path, name: str, rows: list[Row]) -> int:
    """How many of these rows of a group would be made the same way today."""
    if name not in load_plan(plan):
        return 0
    group, bench = group_and_bench(profile, plan, name)
    methods = group.named_methods()
    budget = {(row.setting, row.seed): row.decoder_share for row in rows if row.method == REFERENCE}
    same = [
        row.made_by
        == bench.made_by(
            methods[row.method],
            row.setting,
            row.seed,
            None if row.method == REFERENCE else budget[row.setting, row.seed],
        )
        for row in rows
        if row.method in methods and row.setting in bench.profile.settings
    ]
    return sum(same)
