"""A place to try the runner in: notebooks of a few lines, claims of their own, a run folder, and the command."""

import sys
from pathlib import Path

import nbformat

from slimllm_nb.reproduce import claims, runner

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


def write_notebook(folder: Path, name: str, *cells: str, parameters: str = PARAMETERS) -> None:
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    notebook.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    for cell in cells:
        new = nbformat.v4.new_markdown_cell if cell.startswith("#") else nbformat.v4.new_code_cell
        notebook.cells.append(new(cell))
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")


def save(name: str, metrics: str) -> str:
    return SAVE.replace("NAME", repr(name)).replace("METRICS", metrics)


class Workplace:
    """A folder of notebooks, a folder of runs, and the command."""

    def __init__(self, folder: Path):
        self.notebooks, self.runs, self.claims = folder / "notebooks", folder / "runs", folder / "claims.yaml"
        self.run_folder = self.runs / "embedded"
        self.claims.write_text(CLAIMS)

    def patch(self, monkeypatch) -> None:
        monkeypatch.setenv("SLIMLLM_NB_RUNS", str(self.runs))
        monkeypatch.setattr(claims, "CLAIMS", self.claims)

    def main(self, *options: str) -> int:
        return runner.main(["--notebooks", str(self.notebooks), *options])

    def script(self, *options: str, after: str = "") -> list[str]:
        """The command as a process of its own; `after` is run at its end."""
        lines = [
            "import pathlib, sys",
            "from slimllm_nb.reproduce import claims, runner",
            f"claims.CLAIMS = pathlib.Path({str(self.claims)!r})",
            f"code = runner.main({['--notebooks', str(self.notebooks), *options]!r})",
            after,
            "sys.exit(code)",
        ]
        return [sys.executable, "-c", "\n".join(lines)]

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.run_folder).as_posix() for path in self.run_folder.rglob("*.*"))
