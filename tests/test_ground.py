"""The ground: lock, conda file, Makefile and the committed notebooks hold together."""

import ast
import json
import re
import runpy
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import slimllm_nb

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()
# What is installed into the same environment, and a package that each of them is there for.
OWN_LOCKS = {"course": "otter-grader", "llama-cpp": "llama-cpp-python"}
OWN_LOCKS |= {"sentencepiece": "sentencepiece", "site": "myst-nb"}
LOCKS = {"all": LOCK}
LOCKS |= {name: (ROOT / f"requirements-{name}.lock").read_text() for name in (*OWN_LOCKS, "data", "vllm")}
NOTEBOOKS = [
    "00_overview",
    "01_calibration",
    "02_head_importance",
    "03_channel_importance",
    "04_regression_recovery",
    "05_ratio_allocation",
    "06_evaluation",
    "07_ablations",
    "08_your_own_method",
    "09_fine_tuning",
]
# Assembled from parts, so that this file does not name what it looks for.
REGISTRIES = ["pypi" + ".", "pythonhosted" + ".", "anaconda" + ".org", "anaconda" + ".com"]
REGISTRIES += ["index-url" + " h", "index-url" + "=h"]
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|Users|root|work|tmp|private|mnt|opt)/\w|[A-Z]:\\\\")


def lock_entries(text: str) -> list[tuple[Requirement, list[str]]]:
    """Every entry of a lock file: its requirement with marker, and its hashes."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    entries = []
    for line in filter(None, joined.splitlines()):
        pin, *hashes = re.split(r"\s*--hash=", line)
        entries.append((Requirement(pin), hashes))
    return entries


def comparable(requirement: Requirement) -> tuple[str, str, str]:
    return canonicalize_name(requirement.name), str(requirement.specifier), str(requirement.marker)


@pytest.mark.parametrize("lock", LOCKS.values(), ids=LOCKS)
def test_every_entry_of_a_lock_is_exact_and_has_hashes(lock):
    entries = lock_entries(lock)
    assert len(entries) >= 2
    for requirement, hashes in entries:
        assert re.fullmatch(r"==[\w.+!]+", str(requirement.specifier)), requirement
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", value.strip()) for value in hashes), requirement
        assert requirement.url is None


@pytest.mark.parametrize("lock", LOCKS.values(), ids=LOCKS)
def test_a_lock_names_no_host_or_path(lock):
    assert "://" not in lock
    assert "find-links" not in lock and "index-url" not in lock
    assert not MACHINE_PATH.search(lock)


@pytest.mark.parametrize(("name", "wanted"), OWN_LOCKS.items())
def test_a_lock_of_its_own_changes_no_version(name, wanted):
    """So that its packages can be added to the environment that the two commands make."""
    versions = {comparable(requirement)[:2] for requirement, _ in lock_entries(LOCK)}
    names = {name for name, _ in versions}
    own = {comparable(requirement)[:2] for requirement, _ in lock_entries(LOCKS[name])}
    assert {pin for pin in own if pin[0] in names} <= versions
    assert wanted in {name for name, _ in own} - names


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_direct_dependencies_are_locked(python):
    environment = {"python_version": python, "python_full_version": f"{python}.5"}
    locked = {
        canonicalize_name(requirement.name): next(iter(requirement.specifier)).version
        for requirement, _ in lock_entries(LOCK)
        if requirement.marker is None or requirement.marker.evaluate(environment)
    }
    extras = {name: group for name, group in PROJECT["optional-dependencies"].items() if name not in OWN_LOCKS}
    groups = [PROJECT["dependencies"], *extras.values()]
    for wanted in (Requirement(text) for group in groups for text in group):
        assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)]), wanted


def test_environment_file_has_the_versions_of_the_lock():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert conda["channels"] == ["conda-forge"]
    assert conda["dependencies"][:2] == ["python=3.12", "pip"]
    pins = [comparable(Requirement(text)) for text in conda["dependencies"][2]["pip"]]
    assert pins == [comparable(requirement) for requirement, _ in lock_entries(LOCK)]


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert slimllm_nb.__version__ == PROJECT["version"] == citation["version"]


def test_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE).group(1).split()
    found = set(re.findall(r"^([a-z][a-z-]+):(?!=)", makefile, re.MULTILINE))
    assert found == {*targets, "notebooks-and-verdicts"}  # the last one for make reproduce alone
    assert {"help", "setup", "reproduce", "test", "lab", "notebooks", "lint", "lock", "clean"} <= set(targets)
    shown = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r"^  ([a-z-]+) +\S", shown, re.MULTILINE) == targets


def tracked_files() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "pyproject.toml" in listed
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def test_no_file_names_a_package_index():
    for path in tracked_files():
        text = path.read_text(encoding="utf-8", errors="ignore")
        assert not [one for one in REGISTRIES if one in text], path.relative_to(ROOT)


def test_only_these_notebooks_are_there():
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == NOTEBOOKS


@pytest.fixture(params=NOTEBOOKS)
def notebook_file(request) -> Path:
    return ROOT / "notebooks" / f"{request.param}.ipynb"


@pytest.fixture
def notebook(notebook_file) -> dict:
    return json.loads(notebook_file.read_text(encoding="utf-8"))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def tagged(notebook: dict, tag: str) -> list[dict]:
    return [cell for cell in notebook["cells"] if tag in cell["metadata"].get("tags", [])]


def test_notebook_was_run_top_to_bottom(notebook):
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]


def test_notebook_is_small(notebook_file):
    assert notebook_file.stat().st_size < 300_000


def test_notebook_holds_nothing_of_the_machine_it_ran_on(notebook_file, notebook):
    text = notebook_file.read_text(encoding="utf-8")
    # Pictures are base64, in which anything may turn up.
    text = re.sub(r'"image/png": "[^"]*"', "", text)
    found = MACHINE_PATH.search(text)
    assert found is None, text[max(0, found.start() - 80) : found.end() + 80]
    assert "papermill" not in notebook["metadata"]
    assert not [cell for cell in notebook["cells"] if {"papermill", "execution"} & set(cell["metadata"])]
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


def test_notebook_has_one_cell_of_plain_parameters(notebook):
    (cell,) = tagged(notebook, "parameters")
    assert not tagged(notebook, "injected-parameters")
    names = []
    for statement in ast.parse("".join(cell["source"])).body:
        assert isinstance(statement, ast.Assign) and len(statement.targets) == 1, ast.unparse(statement)
        names.append(statement.targets[0].id)
        ast.literal_eval(statement.value)
    assert {"profile", "output_folder"} <= set(names)


def test_notebook_has_outputs_that_are_compared(notebook):
    cells = tagged(notebook, "nbval-check-output")
    assert cells
    assert all(cell["outputs"] for cell in cells)


PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "assignments/README.md", "data/paper/README.md"]
PAGES += ["docs/api.md", "docs/paper.md", "docs/results.md", "docs/your-model.md"]


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_site_holds_every_notebook_and_page():
    contents = [page for pages in runpy.run_path(str(ROOT / "docs" / "conf.py"))["CONTENTS"].values() for page in pages]
    assert sorted(contents) == sorted([*(f"notebooks/{name}" for name in NOTEBOOKS), *(one[:-3] for one in PAGES[1:])])
