"""The committed notebooks run again, their checked outputs still match, and so do their numbers, within tolerances."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from test_ground import NOTEBOOKS, code_cells, tagged

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = Path(__file__).resolve().parent / "reference"

# Numbers differ a little between processors and their numerical libraries: a head or channel that is nearly tied with
# the next goes the other way, and all later layers see other activations. First matching pattern; relative tolerance.
TOLERANCES = [
    (r"ppl_\w*(magnitude|no_regression)", 0.30, "a model that fell apart: perplexity is chaotic"),
    (r"ppl_dense", 0.001, "nothing is chosen"),
    (r"ppl_50", 0.08, "28 layers of choices"),
    (r"ppl_", 0.04, "24 layers of choices"),
    (r"acc", 0.08, "one question of a hundred or so more or less"),
    (r"greedy_layers_raised", 0.30, "an exchange more or less"),
    (r".*_sd$", 1.0, "spread of three numbers"),
    (r"", 0.02, "shares, scales, errors, similarities"),
]


def run_nbval(notebook: Path, runs: Path) -> subprocess.CompletedProcess:
    """nbval in a process of its own; the cells tagged nbval-check-output are compared, all are run."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval-lax",
        "--nbval-cell-timeout=1200",
        "-v",
        "-p",
        "no:cacheprovider",
    ]
    command += ["--rootdir", str(notebook.parent), "-c", os.devnull, "--noconftest", str(notebook)]
    environment = os.environ | {"SLIMLLM_NB_RUNS": str(runs), "JUPYTER_PREFER_ENV_PATH": "1"}
    return subprocess.run(command, cwd=notebook.parent, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """The model and texts are fetched first: a download in a notebook would print what is not in the saved outputs."""
    from slimllm_nb import sources

    sources.load_model()
    for corpus in sources.CORPORA:
        sources.load_texts(corpus, "held-out")
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_checked_outputs_still_match_and_numbers_are_near(name, runs):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))
    done = run_nbval(path, runs)
    assert done.returncode == 0, done.stdout[-6000:]
    passed = int(re.search(r"(\d+) passed", done.stdout).group(1))
    assert passed == len(code_cells(cells))
    assert len(tagged(cells, "nbval-check-output")) >= 5
    found = json.loads((runs / "embedded" / "results" / f"{name}.json").read_text())["metrics"]
    expected = json.loads((REFERENCE / f"{name}.json").read_text())
    assert found.keys() == expected.keys()
    far = {key: (found[key], expected[key]) for key in expected if not near(key, found[key], expected[key])}
    assert not far, far


def near(metric: str, found: float, expected: float) -> bool:
    relative = next(tolerance for pattern, tolerance, _ in TOLERANCES if re.match(pattern, metric))
    return abs(found - expected) <= relative * abs(expected) + 1e-12


def test_tolerances():
    assert near("ppl_dense_news", 40.03, 40.0) and not near("ppl_dense_news", 40.1, 40.0)
    assert near("ppl_50_slimllm_news", 107, 100) and not near("ppl_50_slimllm_news", 109, 100)
    assert near("ppl_20_magnitude_news", 129, 100) and not near("layers_with_larger_error", 1, 0)


@pytest.mark.parametrize(("saved", "passes"), [("3\n", True), ("4\n", False)])
def test_a_spoilt_output_is_noticed(tmp_path, saved, passes):
    cell = nbformat.v4.new_code_cell("print(1 + 2)", metadata={"tags": ["nbval-check-output"]}, execution_count=1)
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=saved)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = tmp_path / "tiny.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), path)
    assert (run_nbval(path, tmp_path).returncode == 0) == passes
