"""The sweep of data/ablations/plan.yaml: every group of methods over seeds, several rows at a time.

python -m slimllm_nb.comparison.ablations measures what the plan names and data/ablations lacks (--again GROUP: all of
that group anew), in slices of at most 40 minutes, and writes runs/<profile>/ablations.json; `make reference` keeps it
in data/ablations, from where kept_ablations reads it.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Collection
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from slimllm_nb.command import command
from slimllm_nb.comparison.kept import collect, dumped, kept_ablations, of_cell, usable
from slimllm_nb.comparison.plan import PLAN, PlanError, group_and_bench, load_plan, plan_of
from slimllm_nb.comparison.table import Row
from slimllm_nb.files import write_text
from slimllm_nb.progress import bar as progress_bar
from slimllm_nb.reproduce.profiles import load_profile, run_folder
from slimllm_nb.reproduce.tables import sweep_verdicts
from slimllm_nb.reproduce.verdicts import WIDTHS, text_table

MINUTES = 40  # of a slice


@dataclass(frozen=True)
class Task:
    """What one worker does at a time: the rows of a group that share seed and budget, but for those that are kept."""

    profile: str
    plan: Path
    group: str
    setting: str
    seed: int
    kept: tuple[Row, ...] = ()

    def __str__(self) -> str:
        return f"{self.group}, {self.setting} %, seed {self.seed}"


def tasks(profile: str, plan: Path = PLAN, groups: list[str] | None = None, again: Collection[str] = ()) -> list[Task]:
    """What is not kept of these groups (None: all), and all of `again`, group by group, so that what is asked first is
    answered first."""
    former, found = kept_ablations(profile), []
    for name in load_plan(plan):
        if groups is None or name in groups:
            group, bench = group_and_bench(profile, plan, name)
            before = [] if name in again else usable(former, group, bench)
            methods = group.named_methods().keys()
            for seed in range(group.seeds):
                for key in bench.profile.settings:
                    kept = of_cell(before, key, seed)
                    if methods - kept.keys():
                        found.append(Task(profile, plan, name, key, seed, tuple(kept.values())))
    return found


def measure(task: Task) -> list[Row]:
    """The rows of a task, kept, found or measured."""
    group, bench = group_and_bench(task.profile, task.plan, task.group)
    kept = {row.method: row for row in task.kept}
    return list(bench.rows_of_seed(group.named_methods(), task.setting, task.seed, kept))


def sweep(waiting: list[Task], workers: int = 1, minutes: float = MINUTES) -> list[Task]:
    """Measure these; `workers` processes share the cores. After so many minutes no task is begun any more; returns what
    is left. Raises: those of Bench.row."""
    end, threads = time.monotonic() + 60 * minutes, max(1, torch.get_num_threads() // workers)
    context = multiprocessing.get_context("spawn")
    left, running = list(waiting), set()
    with (
        ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool,
        progress_bar(total=len(left), desc="ablations", unit="task") as bar,
    ):
        try:
            while running or (left and time.monotonic() < end):
                while left and len(running) < workers and time.monotonic() < end:
                    running.add(pool.submit(measure, left.pop(0)))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for one in done:
                    one.result()
                    bar.update()
        except BaseException:  # an interruption, too: what runs is not waited for
            pool.shutdown(cancel_futures=True, wait=False)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return left


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m slimllm_nb.comparison.ablations", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--profile", default="embedded")
    parser.add_argument("--plan", type=Path, help="another file of groups")
    parser.add_argument("--groups", help="by comma (default: all)")
    parser.add_argument("--workers", type=int, help="processes at once (default: a core each; one on a GPU)")
    parser.add_argument("--again", default="", metavar="GROUPS", help="by comma: measured anew, kept or not")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"after which no row is begun (default: {MINUTES})"
    )
    options = parser.parse_args(arguments)
    profile, start = load_profile(options.profile), time.perf_counter()
    options.plan = options.plan or plan_of(profile.name)
    plan = load_plan(options.plan)
    groups = options.groups.split(",") if options.groups else None
    again = options.again.split(",") if options.again else []
    if unknown := {*(groups or ()), *again} - set(plan):
        raise PlanError(f"no group {', '.join(sorted(unknown))} in {options.plan}; allowed: {', '.join(plan)}")
    workers = options.workers or ((os.cpu_count() or 1) if profile.device == "cpu" else 1)
    left = sweep(tasks(options.profile, options.plan, groups, again), workers, options.minutes)
    seconds, content = time.perf_counter() - start, collect(options.profile, options.plan, again=again)
    path = run_folder(profile.name) / "ablations.json"
    write_text(path, dumped(content))
    rows = sum(len(group["rows"]) for group in content["groups"].values())
    print(f"{rows} rows, {seconds / 60:.0f} min. Written: {path}; `make reference` keeps them.")
    if judged := sweep_verdicts(profile):
        print(f"\n{text_table(judged, list(WIDTHS))}\n")
    if left:
        print(f"Left, for the same command again: {'; '.join(map(str, left))}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
