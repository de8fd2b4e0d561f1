"""The sweep of data/ablations/plan.yaml: every group of methods over seeds, several rows at a time.

python -m slimllm_nb.comparison.ablations writes runs/<profile>/ablations.json; `make reference` keeps it in
data/ablations, from where kept_ablations reads it. Every row carries the digest of what decided it, so that it shows
which were measured by the code as it is now.
"""

import argparse
import json
import multiprocessing
import os
import platform
import queue
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import Field, RootModel

from slimllm_nb.comparison.compare import Bench, named
from slimllm_nb.comparison.identity import PACKAGES
from slimllm_nb.comparison.protocol import Protocol, protocol_of
from slimllm_nb.comparison.table import Comparison, Row
from slimllm_nb.files import write_text
from slimllm_nb.methods import Method
from slimllm_nb.progress import bar as progress_bar
from slimllm_nb.reproduce.differences import KEPT, REFERENCE, kept_file
from slimllm_nb.reproduce.profiles import Profile, load_profile, run_folder
from slimllm_nb.settings import Settings, read_validated

PLAN = KEPT / "plan.yaml"


class PlanError(ValueError):
    """A plan that is not valid."""


class Group(Settings):
    """Methods that are compared with SlimLLM under one protocol (see comparison.protocol_of)."""

    name: str
    question: str
    seeds: int = Field(ge=1)
    num_samples: int | None = Field(default=None, ge=1)
    calibrate_on: list[str] | None = None
    methods: list[str | dict[str, Any]]

    def protocol(self, profile: Profile) -> Protocol:
        return protocol_of(profile, self.calibrate_on, None, self.num_samples)

    def named_methods(self) -> dict[str, Method]:
        """SlimLLM and the group's own. Errors: PartError for an unknown one."""
        return named(self.methods)


class _Plan(RootModel):
    root: list[Group]


def load_plan(path: Path = PLAN) -> dict[str, Group]:
    """The groups by name. Errors: PlanError naming the file, and for an unknown method and a name that occurs twice."""
    groups = read_validated(path, _Plan, PlanError).root
    plan = {group.name: group for group in groups}
    if len(plan) < len(groups):
        raise PlanError(f"{path}: two groups have one name")
    for group in groups:
        try:
            group.named_methods()
        except ValueError as error:
            raise PlanError(f"{path}: group {group.name}: {error}") from error
    return plan


@dataclass(frozen=True)
class Task:
    """What one worker does at a time: the rows of a group that share seed and budget."""

    profile: str
    plan: Path
    group: str
    setting: str
    seed: int


def tasks(profile: str, plan: Path = PLAN, groups: list[str] | None = None) -> Iterator[Task]:
    """All tasks of these groups (None: all), group by group, so that what is asked first is answered first."""
    settings = load_profile(profile).settings
    for name, group in load_plan(plan).items():
        if groups is None or name in groups:
            for seed in range(group.seeds):
                for key in settings:
                    yield Task(profile, plan, name, key, seed)


def measure(task: Task) -> list[Row]:
    """The rows of a task, measured or found; a worker says so as soon as each is there."""
    group, bench = _group(task.profile, task.plan, task.group)
    rows = []
    for row in bench.rows_of_seed(group.named_methods(), task.setting, task.seed):
        rows.append(row)
        for done in _done:
            done.put(f"{task.group}: {row.method}, {row.setting} %, seed {row.seed}")
    return rows


@cache
def _group(profile: str, plan: Path, name: str) -> tuple[Group, Bench]:
    """A group and its bench; benches of one profile share the model."""
    group, loaded = load_plan(plan)[name], load_profile(profile)
    bench = Bench(loaded, group.protocol(loaded), progress=False)
    bench.share_model(_first.setdefault(profile, bench))
    return group, bench


_first: dict[str, Bench] = {}


def sweep(profile: str, plan: Path = PLAN, groups: list[str] | None = None, workers: int = 1) -> None:
    """Measure what is not measured yet; `workers` processes share the cores. Errors: those of Bench.row."""
    waiting = list(tasks(profile, plan, groups))
    rows_of = {name: len(group.named_methods()) for name, group in load_plan(plan).items()}
    total = sum(rows_of[task.group] for task in waiting)
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    done = context.Queue()
    with (
        ProcessPoolExecutor(workers, context, initializer=_start, initargs=(threads, done)) as pool,
        progress_bar(total=total, desc="ablations", unit="row") as bar,
    ):
        futures = [pool.submit(measure, task) for task in waiting]
        try:
            while not all(one.done() for one in futures) or not done.empty():
                try:
                    bar.set_postfix_str(done.get(timeout=1), refresh=False)
                    bar.update()
                except queue.Empty:
                    for one in futures:
                        if one.done():
                            one.result()
            for one in futures:
                one.result()
        except BaseException:  # an interruption, too: what runs is not waited for
            pool.shutdown(cancel_futures=True, wait=False)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _start(threads: int, done: multiprocessing.Queue) -> None:
    """A worker's first act: its share of the cores, and where it says that a row is there."""
    import torch

    torch.set_num_threads(threads)
    _done.append(done)


_done: list[multiprocessing.Queue] = []


def collect(profile: str, plan: Path = PLAN) -> dict:
    """What was measured of the plan, as it is kept: groups with protocol, dense row and rows."""
    found = {}
    for name in load_plan(plan):
        group, bench = _group(profile, plan, name)
        rows = [row for task in tasks(profile, plan, [name]) for row in _known(task)]
        if rows:
            protocol = bench.protocol.model_dump(mode="json")
            found[name] = {
                "question": group.question,
                "protocol": protocol,
                "dense": bench.dense().model_dump(),
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
    group, bench = _group(task.profile, task.plan, task.group)
    share, rows = None, []
    for method in group.named_methods().values():
        row = bench.found(method, task.setting, task.seed, share)
        if row is None:
            return []
        share = row.decoder_share if share is None else share
        rows.append(row)
    return rows


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
    group, bench = _group(profile, plan, name)
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m slimllm_nb.comparison.ablations", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--profile", default="embedded")
    parser.add_argument("--plan", type=Path, default=PLAN, help="another file of groups")
    parser.add_argument("--groups", help="by comma (default: all)")
    parser.add_argument("--workers", type=int, help="processes at once (default: a core each; one on a GPU)")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        profile, plan = load_profile(options.profile), load_plan(options.plan)
        groups = options.groups.split(",") if options.groups else None
        if unknown := set(groups or ()) - set(plan):
            raise PlanError(f"no group {', '.join(sorted(unknown))} in {options.plan}; allowed: {', '.join(plan)}")
        workers = options.workers or ((os.cpu_count() or 1) if profile.device == "cpu" else 1)
        sweep(options.profile, options.plan, groups, workers)
    except ValueError as error:
        print(f"Stopped: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    finally:
        seconds = time.perf_counter() - start
    content = collect(options.profile, options.plan)
    path = run_folder(profile.name) / "ablations.json"
    write_text(path, dumped(content))
    rows = sum(len(group["rows"]) for group in content["groups"].values())
    print(f"{rows} rows, {seconds / 60:.0f} min. Written: {path}; `make reference` keeps them.")
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
