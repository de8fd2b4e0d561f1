"""The course: make assignments writes what students and teachers get, make grade gives points.

release    every assignments/a*.py (solution and tests inside) becomes, in OUT (default: runs/course), three folders:
           `student` (the notebook without solutions and hidden tests), `solution`, and `autograder` (a zip that otter
           grades by)
grade      every notebook in a folder, in a student's folder within it or in a zip file, each in a process of its own
           that is stopped when it takes too long; a line of points for each, with a reason, on the screen and in
           grades.csv in that folder

Both need the packages of requirements-course.lock, which the make targets install.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import jupytext
import nbformat
import pandas as pd

from slimllm_nb.command import command
from slimllm_nb.files import ROOT, write_text
from slimllm_nb.progress import bar
from slimllm_nb.reproduce.profiles import run_folder

SOURCES = ROOT / "assignments"
NAME = "a[0-9]*.py"
OUT = run_folder("course")
TIMEOUT = 600  # seconds for one submission; the assignments take less than three minutes
MARKER = "RESULT "
LEFT_OUT = {".ipynb_checkpoints", "__MACOSX"}  # folders of hand-ins

# What a releasing process runs, with the masters' paths; the folder beside each takes what comes out.
ASSIGN = """
import sys
from otter.assign import main
for master in sys.argv[1:]:
    print(master, flush=True)
    main(master, master.removesuffix(".ipynb"), no_pdfs=True, no_run_tests=True)
"""
# What a grading process runs: otter's own grading without containers.
GRADE = f"""
import sys
from otter.api import grade_submission
found = grade_submission(sys.argv[1], sys.argv[2], quiet=True)
import json
tests = {{
    name: {{"score": one.score, "possible": one.possible,
            "failed": [case.message for case in one.test_case_results if not case.passed]}}
    for name, one in found.results.items()
}}
print({MARKER!r} + json.dumps(tests))
"""


class CourseError(ValueError):
    """An assignment or a folder that is not what it should be."""


def sources() -> dict[str, Path]:
    """The assignments' sources by name."""
    return {path.stem: path for path in sorted(SOURCES.glob(NAME))}


def release(chosen: list[Path], out: Path) -> list[Path]:
    """Write these assignments' folders; returns the folders that hold them. One process for all: most of the time is
    otter's own start. Raises: CourseError with what otter says."""
    with tempfile.TemporaryDirectory() as temporary:
        masters = [Path(temporary, f"{source.stem}.ipynb") for source in chosen]
        for source, master in zip(chosen, masters, strict=True):
            jupytext.write(jupytext.read(source), master)
        command = [sys.executable, "-c", ASSIGN, *map(str, masters)]
        done = subprocess.run(command, cwd=temporary, capture_output=True, text=True)
        if done.returncode:
            begun = [master.stem for master in masters if str(master) in done.stdout.splitlines()]
            raise CourseError(f"{(begun or ['otter'])[-1]}: otter assign failed:\n{done.stderr[-2000:]}")
        return [_put(master.with_suffix(""), out / master.stem) for master in masters]


def _put(made: Path, folder: Path) -> Path:
    """What otter made of one assignment, in the place of what stood there."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder)
    (student,) = (folder / "student").glob("*.ipynb")
    nb = nbformat.read(student, as_version=4)
    for cell in nb.cells:  # where a solution was, empty lines are left
        cell.source = cell.source.strip()
    nbformat.write(nb, student)
    graded = folder / "autograder"
    (folder / "solution").mkdir()
    (graded / f"{folder.name}.ipynb").replace(folder / "solution" / f"{folder.name}.ipynb")
    (zipped,) = graded.glob("*.zip")
    zipped.replace(graded / "autograder.zip")
    return folder


def autograder(name: str, out: Path) -> Path:
    """What an assignment is graded by; made anew where its source is younger."""
    zipped, source = out / name / "autograder" / "autograder.zip", sources()[name]
    with _releasing:
        if not zipped.is_file() or zipped.stat().st_mtime < source.stat().st_mtime:
            release([source], out)
    return zipped


_releasing = threading.Lock()


def assignment_of(notebook: Path) -> str:
    """Which assignment a notebook answers. Raises: CourseError for what is no notebook, or none of ours."""
    if notebook.is_dir():
        raise CourseError("holds no notebook (*.ipynb), or cannot be unpacked")
    try:
        nb = nbformat.read(notebook, as_version=4)
        name = nb.metadata["otter"]["assignment_name"]
    except KeyError:
        raise CourseError("not a notebook of this course: it names no assignment") from None
    except Exception as error:  # whatever stands in that file
        raise CourseError(f"not a notebook: {str(error).splitlines()[0][:120]}") from error
    if name not in sources():
        raise CourseError(f"a notebook of {name!r}; allowed: {', '.join(sources())}")
    return name


def hand_ins(folder: Path, unpacked: Path) -> list[tuple[str, Path]]:
    """(name, notebook) of all that was handed in: a notebook by its own name, one in a student's folder or zip file by
    the name of that; a folder or zip file without any by itself. Zip files are unpacked below `unpacked`. Raises:
    CourseError where nothing was handed in."""
    found = [(path.name, path) for path in folder.glob("*.ipynb") if path.is_file()]
    for path in folder.iterdir():
        inside, name = path, path.name
        if path.suffix == ".zip":
            inside, name = unpacked / path.name, path.stem
            inside.mkdir()
            with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as zipped:
                zipped.extractall(inside)
        if inside.is_dir() and name not in LEFT_OUT:
            notebooks = inside.rglob("*.ipynb")
            ours = [(name, one) for one in notebooks if not LEFT_OUT & {*one.relative_to(inside).parts}]
            found += ours or [(name, inside)]  # which gets a line that says so
    if not any(path.is_file() for _, path in found):
        raise CourseError(f"{folder} holds no notebooks (*.ipynb), no folders that hold some, and no zip files")
    return sorted(found)


def grade(submission: str, notebook: Path, out: Path, timeout: float, threads: int) -> dict:
    """A line of the table: points by question, their sum, and a reason."""
    start, line = time.perf_counter(), {"submission": submission}
    try:
        name = assignment_of(notebook)
    except CourseError as error:
        return line | {"points": 0, "of": None, "reason": str(error)}
    line |= {"assignment": name}
    with tempfile.TemporaryDirectory() as temporary:
        # Under a plain name, and for this process' own kernel: the student's may have another name.
        nb, own = nbformat.read(notebook, as_version=4), Path(temporary, f"{name}.ipynb")
        nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(nb, own)
        command = [sys.executable, "-c", GRADE, str(own), str(autograder(name, out).absolute())]
        environment, pipe = os.environ | {"OMP_NUM_THREADS": str(threads)}, subprocess.PIPE
        options = {"stdout": pipe, "stderr": pipe, "text": True, "start_new_session": True}
        process = subprocess.Popen(command, cwd=temporary, env=environment, **options)
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the kernel that it started as well
            process.communicate()
            reason = f"took more than {timeout:.0f} seconds and was stopped"
            return line | {"points": 0, "of": None, "reason": reason}
    found = [one for one in output.splitlines() if one.startswith(MARKER)]
    line["seconds"] = round(time.perf_counter() - start)
    if not found:
        last = (errors.strip().splitlines() or ["no output"])[-1]
        return line | {"points": 0, "of": None, "reason": f"could not be graded: {last[:200]}"}
    tests = json.loads(found[-1].removeprefix(MARKER))
    if not tests:
        reason = "no test ran: its code may change the folder (os.chdir), or end the kernel"
        return line | {"points": 0, "of": None, "reason": reason}
    missed = [f"{question}: {_short(one['failed'])}" for question, one in tests.items() if one["failed"]]
    return line | {
        "points": sum(one["score"] for one in tests.values()),
        "of": sum(one["possible"] for one in tests.values()),
        "reason": "; ".join(missed) or "all tests passed",
        **{question: one["score"] for question, one in tests.items()},
    }


def _short(messages: list[str]) -> str:
    """The first failure, and how many more there are."""
    first = messages[0].strip().splitlines()[-1]
    return first[:160] + (f" (and {len(messages) - 1} more)" if len(messages) > 1 else "")


def grade_folder(folder: Path, out: Path, timeout: float, jobs: int | None = None) -> pd.DataFrame:
    """All notebooks of a folder; `jobs` of them at a time share the cores (None: one for each core, but no more than
    there are notebooks). Raises: CourseError for a folder without any, and for jobs below 1."""
    if jobs is not None and jobs < 1:
        raise CourseError(f"--jobs is {jobs}; allowed: at least 1")
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as unpacked:
        handed = hand_ins(folder, Path(unpacked))
        jobs = min(jobs or cores, len(handed))
        with ThreadPoolExecutor(jobs) as pool:
            found = pool.map(lambda one: grade(*one, out, timeout, max(1, cores // jobs)), handed)
            lines = list(bar(found, desc="grading", unit="submission", total=len(handed)))
    table = pd.DataFrame(lines)
    first = ["submission", "assignment", "points", "of"]
    last = ["seconds", "reason"]
    questions = sorted(set(table.columns) - {*first, *last})
    table = table.reindex(columns=[*first, *questions, *last])
    write_text(folder / "grades.csv", table.to_csv(index=False))
    return table


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("release", "grade"))
    parser.add_argument("submissions", nargs="?", type=Path, help="a folder of notebooks")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for one submission")
    parser.add_argument("--jobs", type=int, help="submissions at a time (default: one for each core)")
    options = parser.parse_args(arguments)
    if options.what == "release":
        print(*release(list(sources().values()), options.out), sep="\n")
        return 0
    if options.submissions is None or not options.submissions.is_dir():
        raise CourseError(f"SUBMISSIONS is {options.submissions}; allowed: a folder of notebooks")
    table = grade_folder(options.submissions, options.out, options.timeout, options.jobs)
    print(table.to_string(index=False, max_colwidth=70))
    print(f"Written: {options.submissions / 'grades.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
