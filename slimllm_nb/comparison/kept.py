"""What is kept of the sweep: rows with the digest of what made them, and how many of them today's code would make.

A sweep takes hours, and code is tidied more often than it comes to other numbers. So a kept row counts as today's in
two cases: today's code measured it, or it is *confirmed*: other seeds of the same method and setting, kept by the same
older code, were measured again today and came out the same (TOLERANCE). `make ablations SWEEP="--seeds 1"` measures the
first seed of everything again.
"""

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
from slimllm_nb.methods import Method
from slimllm_nb.reproduce.differences import REFERENCE, kept_file
from slimllm_nb.reproduce.profiles import load_profile

TOLERANCE = 1e-4  # relative, of a perplexity: sums in another order change 1e-5, another choice of what goes far more
ANY_SEED = -1


def collect(profile: str, plan: Path = PLAN, kept: Path | None = None) -> dict:
    """What was measured of the plan, as it is kept: groups with protocol, dense row and rows.

    What is not measured yet is as it was kept before under the same protocol, so that a sweep that was stopped loses
    nothing; those rows' digests tell them apart, and `recipe` says which of them are confirmed.
    """
    found, former = {}, kept_ablations(profile, plan, kept)
    for name in load_plan(plan):
        group, bench = group_and_bench(profile, plan, name)
        before, methods = former and former.groups.get(name), group.named_methods()
        if before and before.protocol != bench.protocol:
            before = None
        earlier = [row for row in (before.rows if before else []) if row.method in methods]
        rows, measured = [], {}
        for task in tasks(profile, plan, [name]):
            known = _known(task)
            measured |= {_place(row): row for row in known}
            rows += known or [row for row in earlier if (row.setting, row.seed) == (task.setting, task.seed)]
        current = {key: _recipe(bench, methods[key[0]], key[1]) for key in {_cell(row) for row in rows}}
        rows = _confirmed(rows, current, measured, _unchanged(earlier, measured))
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


def _cell(row: Row) -> tuple[str, str]:
    return row.method, row.setting


def _place(row: Row) -> tuple[str, str, int]:
    return row.method, row.setting, row.seed


def _recipe(bench: Bench, method: Method, setting: str) -> str:
    """What all seeds of a method at a setting have in common."""
    return bench.made_by(method, setting, ANY_SEED, None)


def _unchanged(earlier: list[Row], measured: dict[tuple[str, str, int], Row]) -> set[tuple[str, str, str]]:
    """Method, setting and older recipe of which every row that was measured again came out the same."""
    same: dict[tuple[str, str, str], bool] = {}
    for row in earlier:
        again = measured.get(_place(row))
        if again is not None and again.made_by != row.made_by:
            key = (*_cell(row), row.recipe)
            same[key] = same.get(key, True) and _agree(row, again)
    return {key for key, agreed in same.items() if agreed}


def _confirmed(
    rows: list[Row],
    current: dict[tuple[str, str], str],
    measured: dict[tuple[str, str, int], Row],
    same: set[tuple[str, str, str]],
) -> list[Row]:
    """The rows, with today's recipe where they were measured today or others of theirs came out the same."""
    return [
        row.model_copy(update={"recipe": current[_cell(row)]})
        if _place(row) in measured or (*_cell(row), row.recipe) in same
        else row
        for row in rows
    ]


def _agree(row: Row, again: Row) -> bool:
    return row.decoder_parameters == again.decoder_parameters and all(
        abs(again.perplexity[corpus] / value - 1) <= TOLERANCE for corpus, value in row.perplexity.items()
    )


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
            bench.keep(row.made_by, lambda row=row: row.model_copy(update={"recipe": ""}))


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
    """The kept rows of a profile, by group; of `total` today's code `measured` some, and some are `confirmed`."""

    groups: dict[str, Comparison]
    questions: dict[str, str]
    measured: int
    confirmed: int
    total: int

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


def kept_ablations(profile: str = "embedded", plan: Path = PLAN, kept: Path | None = None) -> Kept | None:
    """What data/ablations/<profile>.json holds; None: nothing is kept."""
    path = kept or kept_file(profile)
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    groups, measured, confirmed, total = {}, 0, 0, 0
    for name, one in content["groups"].items():
        rows = [Row.model_validate(row) for row in one["rows"]]
        protocol = Protocol.model_validate(one["protocol"])
        groups[name] = Comparison(protocol, Row.model_validate(one["dense"]), rows)
        by_today, same = _current(profile, plan, name, rows)
        measured, confirmed, total = measured + by_today, confirmed + same, total + len(rows)
    questions = {name: one["question"] for name, one in content["groups"].items()}
    return Kept(groups, questions, measured, confirmed, total)


def _current(profile: str, plan: Path, name: str, rows: list[Row]) -> tuple[int, int]:
    """How many of these rows of a group today's code measured, and how many others are confirmed."""
    if name not in load_plan(plan):
        return 0, 0
    group, bench = group_and_bench(profile, plan, name)
    methods = group.named_methods()
    budget = {(row.setting, row.seed): row.decoder_share for row in rows if row.method == REFERENCE}
    measured = confirmed = 0
    for row in rows:
        if row.method in methods and row.setting in bench.profile.settings:
            method = methods[row.method]
            share = None if row.method == REFERENCE else budget[row.setting, row.seed]
            by_today = row.made_by == bench.made_by(method, row.setting, row.seed, share)
            measured += by_today
            confirmed += not by_today and row.recipe == _recipe(bench, method, row.setting)
    return measured, confirmed
