"""Before and after the notebooks: what is refused, what makes a run out of date, what is judged and reported."""

import json
import re
import shutil

import nbformat
import pytest

from slimllm_nb import fingerprint
from slimllm_nb.corpora import TextSource
from slimllm_nb.files import write_text
from slimllm_nb.reproduce import __main__ as judge
from slimllm_nb.reproduce import load_profile, start
from slimllm_nb.reproduce.claims import PaperError
from slimllm_nb.reproduce.verdicts import read_result
from workplace import write_notebook

# --- refused before anything starts ---------------------------------------------------------------------------------


def refused(place, capsys, *options: str) -> str:
    assert start.main(["--notebooks", str(place.notebooks), *options]) == 2
    assert not place.runs.exists()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--profile", "llama-8b"], r"unknown profile 'llama-8b'; allowed: .*embedded"),
        (["-p", "sample=3"], r"-p sample=3: no notebook has a parameter 'sample'; allowed: samples, share"),
        (["-p", "samples=many"], r"-p samples=many: the value must be int, like the default 32; it is str"),
        (["-p", "samples=1.5"], r"must be int, like the default 32; it is float"),
        (["-p", "samples=true"], r"must be int, like the default 32; it is bool"),
        (["-p", "samples=[1"], r"-p samples=\[1: the value is not valid YAML"),
        (["-p", "samples"], r"-p samples: give it as name=value"),
        (["-p", "profile=embedded"], r"-p profile=embedded: profile is set by PROFILE"),
        (["-p", "output_folder=x"], r"output_folder is set by the environment variable SLIMLLM_NB_RUNS"),
    ],
)
def test_a_wrong_setting_is_refused(options, message, workplace, capsys):
    write_notebook(workplace.notebooks, "01_first")
    assert re.search("Stopped: .*" + message, refused(workplace, capsys, *options))


def test_a_folder_of_runs_that_make_cannot_work_in_is_refused(workplace, capsys, monkeypatch, tmp_path):
    write_notebook(workplace.notebooks, "01_first")
    monkeypatch.setenv("SLIMLLM_NB_RUNS", str(tmp_path / "my runs"))
    assert "my runs; make can work in no folder with a space" in refused(workplace, capsys)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("profile = load()", r"its parameters cell may hold only lines of the form name = literal"),
        ("samples = 1", r"its parameters cell has no profile"),
        ("samples = = 1", r"its parameters cell may hold only lines of the form name = literal"),
    ],
)
def test_a_broken_parameters_cell_is_refused(parameters, message, workplace, capsys):
    write_notebook(workplace.notebooks, "01_first")
    write_notebook(workplace.notebooks, "02_second", parameters=parameters)
    assert re.search(r"02_second.ipynb.*" + message, refused(workplace, capsys))


@pytest.mark.parametrize("text", ["{", "[]", '{"cells": [{"metadata": {}}, {"metadata": {"tags": ["parameters"]}}]}'])
def test_what_is_not_a_notebook_is_refused(text, workplace, capsys):
    workplace.notebooks.mkdir(parents=True)
    (workplace.notebooks / "01_first.ipynb").write_text(text)
    assert "01_first.ipynb is not a notebook" in refused(workplace, capsys)


def test_a_notebook_needs_exactly_one_parameters_cell(tmp_path):
    path = tmp_path / "n.ipynb"
    for count in (0, 2):
        cell = {"cell_type": "code", "source": ["a = 1"], "metadata": {"tags": ["parameters"]}}
        path.write_text(json.dumps({"cells": [cell] * count}))
        with pytest.raises(start.NotebookError, match=f"has {count} cells tagged 'parameters'"):
            start.read_parameters(path)


# --- what a run depends on --------------------------------------------------------------------------------------------


@pytest.fixture
def dependent(tmp_path, monkeypatch):
    """A copy of all that a run depends on, a profile with files of its own, and its fingerprint."""
    for module, constant, name in ((fingerprint, "PACKAGE", "slimllm_nb"), (start, "DATA", "data")):
        shutil.copytree(getattr(module, constant), tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(module, constant, tmp_path / name)
    shutil.copy(start.LOCK, tmp_path / "requirements.lock")
    monkeypatch.setattr(start, "LOCK", tmp_path / "requirements.lock")
    for name in ("mine.txt", "parts.py", "mine.csv", "model/config.json", "model/model.safetensors"):
        write_text(tmp_path / name, "My own.")
    profile = load_profile("embedded")
    published = load_profile("llama-7b-20").published.model_copy(update={"table": str(tmp_path / "mine.csv")})
    own = {"texts": {"mine": TextSource(files=[str(tmp_path / "mine.txt")])}, "parts": [str(tmp_path / "parts.py")]}
    profile = profile.model_copy(update={**own, "published": published, "model": str(tmp_path / "model")})

    def made_from(profile=profile, **parameters):
        fingerprint._code.cache_clear()
        return start.made_from(profile, parameters)

    yield tmp_path, profile, made_from
    fingerprint._code.cache_clear()


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("slimllm_nb/heads.py", True),
        ("requirements.lock", True),
        ("mine.txt", True),
        ("parts.py", True),
        ("mine.csv", True),
        ("model/config.json", True),
        ("model/model.safetensors", True),
        ("data/ablations/plan.yaml", True),
        ("data/paper/table5_ablation_alpha.csv", True),
        ("data/paper/claims.yaml", True),
        ("data/tasks/analogies.yaml", True),
        ("data/zeroshot/embedded.json", True),
        ("data/paper/README.md", False),
        ("data/gpu/card.json", False),
        ("data/tasks/__pycache__/utils.cpython-311.pyc", False),
    ],
)
def test_a_run_depends_on_its_files(file, changes, dependent):
    folder, _, made_from = dependent
    before = made_from()
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((path.read_bytes() if path.exists() else b"") + b"\n# changed\n")
    assert (made_from() != before) == changes


def test_a_run_depends_on_its_profile_and_parameters(dependent):
    _, profile, made_from = dependent
    others = [made_from(), made_from(profile.model_copy(update={"seed": 43})), made_from(samples=8)]
    assert len(set(others)) == 3 and made_from() == others[0]


# --- what is left is judged -------------------------------------------------------------------------------------------


@pytest.fixture
def finished(workplace):
    """Two notebooks that ran; finished(first metrics, second metrics) judges what they left."""

    def judged(first: dict, second: dict) -> int:
        executed = []
        for name, metrics in (("01_first", first), ("02_second", second)):
            path = write_notebook(workplace.run_folder, name, "# Text")
            made = nbformat.read(path, as_version=4)
            made.metadata["papermill"] = {"duration": 1.5}
            nbformat.write(made, path)
            content = {"notebook": name, "profile": "embedded", "metrics": metrics}
            write_text(workplace.run_folder / "results" / f"{name}.json", json.dumps(content))
            executed.append(str(path))
        return judge.main(executed)

    return judged


def test_an_expected_claim_that_does_not_hold_fails_the_run(finished, workplace, capsys):
    assert finished({"a": 2.5}, {"a": 32.0}) == 1
    assert "FAILED: 01_first: A is lower: does not hold (measured: 2.5)" in capsys.readouterr().err
    # All the same, the results and the report are complete.
    assert {"results.json", "report/index.html", "report/01_first.html"} <= set(workplace.files())
    assert "does not hold" in (workplace.run_folder / "report" / "index.html").read_text()


@pytest.mark.parametrize(("value", "verdict"), [({"a": 1.9}, "inconclusive"), ({"b": 1.0}, "not run")])
def test_an_expected_claim_that_was_not_shown_to_hold_fails_the_run(value, verdict, finished, capsys):
    assert finished(value, {"a": 32.0}) == 1
    assert f"FAILED: 01_first: A is lower: {verdict}" in capsys.readouterr().err


def test_a_claim_that_is_not_expected_is_reported_and_no_more(finished, capsys):
    assert finished({"a": 1.0}, {"a": 31.0}) == 0
    assert "2 claims: 1 holds, 1 does not hold." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a result file"),
        ("[]", "is not a result file"),
        ('{"notebook": "n", "profile": "embedded", "metrics": [1]}', "is not a result file"),
        ('{"notebook": "n", "profile": "embedded", "metrics": {"a": "1"}}', "is not a result file"),
        ('{"notebook": "n", "profile": "embedded", "metrics": {}}', "holds no metrics"),
        ('{"notebook": "n", "profile": "embedded", "metrics": {"a": NaN}}', "not finite"),
        ('{"notebook": "m", "profile": "embedded", "metrics": {"a": 1}}', r"belongs to \('m', 'embedded'\)"),
    ],
)
def test_a_result_that_is_none(text, message, tmp_path):
    write_text(tmp_path / "results" / "n.json", text)
    with pytest.raises(PaperError, match=message):
        read_result(tmp_path, "n", "embedded")
