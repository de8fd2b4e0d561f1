"""Run the executed notebooks of a profile again and compare: python -m slimllm_nb.reproduce.check --profile NAME

nbval re-executes copies of runs/<profile>/*.ipynb in a temporary run folder and compares the checked cells, letter by
letter; nothing in the run folder is touched. Exit status: 0 when all are the same, 1 when not, 2 when there is nothing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nbformat

from slimllm_nb.command import command
from slimllm_nb.files import ROOT
from slimllm_nb.reproduce.profiles import load_profile, run_folder

SECONDS_PER_CELL = 6 * 3600  # a zero-shot cell of a 7B model asks 30,000 questions; a hang ends all the same
CHECKED = "nbval-check-output"


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slimllm_nb.reproduce.check", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="embedded", help="a file of data/profiles, or the path of one of your own")
    parser.add_argument("--cell-timeout", type=int, default=SECONDS_PER_CELL, metavar="SECONDS", help="for one cell")
    options = parser.parse_args(arguments)
    profile = load_profile(options.profile)
    folder = run_folder(profile.name)
    notebooks = sorted(path for path in folder.glob("*.ipynb") if path.suffixes == [".ipynb"])
    if not notebooks:
        print(f"Nothing was checked: {folder} has no executed notebook; run make reproduce first", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        results = [_check(path, profile.name, Path(temporary), options.cell_timeout) for path in notebooks]
    print(f"{sum(results)} of {len(results)} notebooks say the same again.")
    return 0 if all(results) else 1


def _check(path: Path, profile: str, temporary: Path, seconds_per_cell: int) -> bool:
    copy, runs, start = temporary / "notebooks" / path.name, temporary / "runs", time.perf_counter()
    for folder in (copy.parent, runs / profile):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, copy)
    if (dense := path.parent / "dense.json").is_file():  # what the dense gate found
        shutil.copy(dense, runs / profile)
    done, passed = run_nbval(copy, runs, seconds_per_cell)
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    checked = [CHECKED in cell.metadata.get("tags", []) for cell in cells]
    same = sum(ok for ok, wanted in zip(passed.values(), checked, strict=False) if wanted)
    complete = done.returncode == 0 and len(passed) == len(cells)
    largest = _largest_difference(*(one / "results" / f"{path.stem}.json" for one in (path.parent, runs / profile)))
    print(
        f"{path.stem}: {same} of {sum(checked)} checked cells are the same, {largest} "
        f"({time.perf_counter() - start:.0f} s)",
        flush=True,
    )
    if not complete:
        print(done.stdout[-4000:] + done.stderr[-2000:], file=sys.stderr)
    return complete


def _largest_difference(before: Path, after: Path) -> str:
    try:
        old, new = (json.loads(path.read_text(encoding="utf-8"))["metrics"] for path in (before, after))
    except (OSError, ValueError, KeyError):
        return "no result to compare"
    if old.keys() != new.keys():
        return f"other metrics: {', '.join(sorted(old.keys() ^ new.keys()))}"
    relative = {name: abs(new[name] - old[name]) / max(abs(old[name]), 1e-12) for name in old}
    name = max(relative, key=relative.get)
    return "metrics the same" if not relative[name] else f"metrics within {relative[name]:.1e} ({name})"


def run_nbval(
    notebook: Path, runs: Path, seconds_per_cell: int = SECONDS_PER_CELL
) -> tuple[subprocess.CompletedProcess, dict[str, bool]]:
    """Run a notebook under nbval, with `runs` as the folder of runs; the process, and for each code cell by its number
    whether it passed."""
    runs.mkdir(parents=True, exist_ok=True)
    report = runs / f"{notebook.stem}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(notebook), f"--junitxml={report}"]
    options = ["--nbval-lax", "--nbval-current-env", f"--nbval-cell-timeout={seconds_per_cell}"]
    # The environment's own kernel, even where the user has installed another of the same name.
    environment = os.environ | {"SLIMLLM_NB_RUNS": str(runs), "JUPYTER_PREFER_ENV_PATH": "1"}
    done = subprocess.run([*command, *options], env=environment, cwd=ROOT, capture_output=True, text=True)
    if not report.is_file():  # nbval was killed, or did not start
        return done, {}
    cases = ElementTree.parse(report).iter("testcase")
    return done, {case.get("name"): not list(case.iter("failure")) + list(case.iter("skipped")) for case in cases}


if __name__ == "__main__":
    sys.exit(main())
