"""Assignments without a server: a release made once, and notebooks graded in this process, cell by cell.

A cell that fails stops neither otter nor this; otter's own grading, in a kernel, is tried on a few whole notebooks.
"""

import contextlib
import io
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import nbformat
from packaging.utils import canonicalize_name

from slimllm_nb.files import write_text
from test_ground import LOCKS, lock_entries

# Cells that start otter, run its checks, or show something that takes time and that no test looks at.
NOT_GRADED = ("otter.Notebook", "grader.check", "half of layer", "after the search")


def install_otter(folder: Path) -> None:
    """The packages of the course that `make test` does not bring, into a folder of their own."""
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*command, "--target", folder, "-r", only_new(folder / "new.lock")], check=True)


def only_new(file: Path) -> Path:
    """The entries of the course's lock for packages that are not installed."""
    installed = {canonicalize_name(one.name) for one in distributions()}
    lines = [
        " ".join([str(requirement), *(f"--hash={value.strip()}" for value in hashes)])
        for requirement, hashes in lock_entries(LOCKS["course"])
        if canonicalize_name(requirement.name) not in installed
    ]
    write_text(file, "\n".join(lines) + "\n")
    return file


def cells(notebook: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


def points(sources: list[str], release: Path) -> dict[str, float]:
    """Points by question of a notebook with these code cells, by public and hidden tests."""
    from otter.test_files.exception_test import ExceptionTestFile

    environment = {"__name__": "__main__"}
    for source in sources:
        source = source.replace("[:1024]", "[:256]")  # fewer tokens through the model
        if any(one in source for one in NOT_GRADED):
            continue
        with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source, "<cell>", "exec"), environment)
    found = {}
    with zipfile.ZipFile(release / "autograder" / "autograder.zip") as zipped:
        for name in sorted(zipped.namelist()):
            if name.startswith("tests/"):
                file = ExceptionTestFile.from_string(zipped.read(name).decode(), path=name)
                file.run(environment)
                found[file.name] = file.score
    return found
