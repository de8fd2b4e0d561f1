"""A place to try `make reproduce` in: a copy of the repository with short notebooks and claims of their own."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat

from slimllm_nb.files import ROOT, write_text
from slimllm_nb.progress import FOLLOWED
from slimllm_nb.reproduce import claims, notebook
from slimllm_nb.reproduce.start import INPUTS

PARAMETERS = 'profile = "embedded"\noutput_folder = ""\nsamples = 32\nshare = 0.5\n'
# What a notebook of this project does at its end, without importing the package.
SAVE = """
import json, os
from pathlib import Path
folder = Path(os.environ["SLIMLLM_NB_RUNS"]) / profile / "results"
folder.mkdir(parents=True, exist_ok=True)
result = {"notebook": NAME, "profile": profile, "metrics": METRICS}
(folder / f"{NAME}.json").write_text(json.dumps(result))
"""
CLAIMS = """
- {id: one, notebook: 01_first, claim: A is lower, source: Table 6, paper: 1 against 2, left: a, right: 2.0,
   relation: less, margin: 0.1, expected: [embedded]}
- {id: two, notebook: 02_second, claim: A is 32, source: Table 7, paper: "32", left: a, right: 32,
   relation: within, absolute: 0}
"""


def write_notebook(folder: Path, name: str, *cells: str, parameters: str = PARAMETERS) -> Path:
    made = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    made.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    for cell in cells:
        new = nbformat.v4.new_markdown_cell if cell.startswith("#") else nbformat.v4.new_code_cell
        made.cells.append(new(cell))
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(made, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def save(name: str, metrics: str) -> str:
    return SAVE.replace("NAME", repr(name)).replace("METRICS", metrics)


def make(*arguments: str, folder: Path = ROOT) -> list[str]:
    """The command, in the environment that runs the tests."""
    return ["make", "-C", str(folder), "-o", "setup", f"ENVIRONMENT={sys.prefix}", *arguments]


def program(file: str) -> ModuleType:
    """A file of the repository that is no module of the package, imported."""
    specification = importlib.util.spec_from_file_location(Path(file).stem, ROOT / file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


class Workplace:
    """A folder of notebooks, a folder of runs, and the commands."""

    def __init__(self, folder: Path):
        self.root, self.runs = folder / "repository", folder / "runs"
        self.notebooks, self.run_folder = self.root / "notebooks", self.runs / "embedded"
        self.claims = folder / "claims.yaml"
        self.claims.write_text(CLAIMS)

    def patch(self, monkeypatch) -> None:
        monkeypatch.setenv("SLIMLLM_NB_RUNS", str(self.runs))
        monkeypatch.setenv(FOLLOWED, "")  # which a run sets for its kernel: removed again behind the test
        monkeypatch.setattr(claims, "CLAIMS", self.claims)

    def run(self, name: str) -> int:
        """One notebook, by the recipe of the Makefile."""
        if not (self.run_folder / INPUTS).exists():
            write_text(self.run_folder / INPUTS, json.dumps({"parameters": {"profile": "embedded"}}))
        # Relative, as make has them.
        return notebook.main([os.path.relpath(one / f"{name}.ipynb") for one in (self.notebooks, self.run_folder)])

    def clone(self) -> None:
        """The repository for `reproduce`."""
        unwanted = shutil.ignore_patterns("__pycache__")
        for name in ("slimllm_nb", "data"):
            shutil.copytree(ROOT / name, self.root / name, ignore=unwanted)
        for name in ("Makefile", "requirements.lock"):
            shutil.copy(ROOT / name, self.root)
        self.claims = self.root / "data" / "paper" / "claims.yaml"
        self.claims.write_text(CLAIMS)

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        """make reproduce, in a process group of its own."""
        pipe, environment = subprocess.PIPE, os.environ | {"SLIMLLM_NB_RUNS": str(self.runs)}
        environment.pop("PYTHONPATH", None)
        command = make("reproduce", *arguments, folder=self.root)
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True)

    def reproduce(self, *arguments: str) -> subprocess.CompletedProcess:
        with self.start(*arguments) as process:
            out, errors = process.communicate()
        return subprocess.CompletedProcess([], process.returncode, out, errors)

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.run_folder).as_posix() for path in self.run_folder.rglob("*.*"))
