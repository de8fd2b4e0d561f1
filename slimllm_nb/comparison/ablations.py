"""The sweep of data/ablations/plan.yaml: every group of methods over seeds, several rows at a time.

python -m slimllm_nb.comparison.ablations writes runs/<profile>/ablations.json; `make reference` keeps it in
data/ablations, from where kept_ablations reads it. Every row carries the digest of what decided it, so that it shows
which were measured by the code as it is now.
"""

import argparse
import multiprocessing
import os
import queue
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from slimllm_nb.command import command
from slimllm_nb.comparison.kept import collect, dumped, restore
from slimllm_nb.comparison.plan import PLAN, PlanError, Task, group_and_bench, load_plan, tasks
from slimllm_nb.comparison.table import Row
from slimllm_nb.files import write_text
from slimllm_nb.progress import bar as progress_bar
from slimllm_nb.reproduce.profiles import load_profile, run_folder


def measure(task: Task) -> list[Row]:
    """The rows of a task, measured or found; a worker says so as soon as each is there."""
    group, bench = group_and_bench(task.profile, task.plan, task.group)
    rows = []
    for row in bench.rows_of_seed(group.named_methods(), task.setting, task.seed):
        rows.append(row)
        for done in _done:
            done.put(f"{task.group}: {row.method}, {row.setting} %, seed {row.seed}")
    return rows


def sweep(
    profile: str,
    plan: Path = PLAN,
    groups: list[str] | None = None,
    workers: int = 1,
    seeds: int | None = None,
) -> None:
    """Measure what is not measured yet, the first `seeds` of every group (None: all); `workers` processes share the
    cores. Raises: those of Bench.row; ValueError for seeds below 1."""
    if seeds is not None and seeds < 1:
        raise ValueError(f"--seeds is {seeds}; allowed: at least 1")
    waiting = list(tasks(profile, plan, groups, seeds))
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


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m slimllm_nb.comparison.ablations", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--profile", default="embedded")
    parser.add_argument("--plan", type=Path, default=PLAN, help="another file of groups")
    parser.add_argument("--groups", help="by comma (default: all)")
    parser.add_argument("--workers", type=int, help="processes at once (default: a core each; one on a GPU)")
    parser.add_argument(
        "--from-kept", action="store_true", help="do not measure what data/ablations keeps and today's code would make"
    )
    parser.add_argument("--seeds", type=int, help="the first so many of every group; confirms the kept others")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        profile, plan = load_profile(options.profile), load_plan(options.plan)
        groups = options.groups.split(",") if options.groups else None
        if unknown := set(groups or ()) - set(plan):
            raise PlanError(f"no group {', '.join(sorted(unknown))} in {options.plan}; allowed: {', '.join(plan)}")
        if options.from_kept:
            restore(options.profile, options.plan)
        workers = options.workers or ((os.cpu_count() or 1) if profile.device == "cpu" else 1)
        sweep(options.profile, options.plan, groups, workers, options.seeds)
    finally:
        seconds = time.perf_counter() - start
    content = collect(options.profile, options.plan)
    path = run_folder(profile.name) / "ablations.json"
    write_text(path, dumped(content))
    rows = sum(len(group["rows"]) for group in content["groups"].values())
    print(f"{rows} rows, {seconds / 60:.0f} min. Written: {path}; `make reference` keeps them.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
