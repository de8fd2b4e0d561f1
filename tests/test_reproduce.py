"""The runner: what it refuses, keeps, skips and reports, with a function in the place of the kernel."""

import json
import os
import re
import shutil

import nbformat
import pytest

from slimllm_nb import fingerprint
from slimllm_nb.corpora import TextSource
from slimllm_nb.files import write_text
from slimllm_nb.reproduce import pages, profiles, runner, stamps
from workplace import CLAIMS, PARAMETERS, write_notebook

# --- refused before anything starts ---------------------------------------------------------------------------------


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
        (["-p", "profile=embedded"], r"-p profile=embedded: profile is set by --profile"),
        (["-p", "output_folder=x"], r"output_folder is set by the environment variable SLIMLLM_NB_RUNS"),
        (["--notebooks", "/nowhere"], r"/nowhere has no notebooks"),
    ],
)
def test_a_wrong_setting_is_refused(options, message, workplace, capsys):
    write_notebook(workplace.notebooks, "01_first")
    assert workplace.main(*options) == 2
    assert re.search("Stopped: .*" + message, capsys.readouterr().err)
    assert not workplace.runs.exists()


@pytest.mark.parametrize(
    ("cells", "parameters", "message"),
    [
        ([], "profile = load()", r"its parameters cell may hold only lines of the form name = literal"),
        ([], "samples = 1", r"its parameters cell has no profile"),
        (["x = = 1"], PARAMETERS, r"cell 1 is not valid Python"),
    ],
)
def test_a_broken_notebook_is_refused(cells, parameters, message, workplace, capsys):
    write_notebook(workplace.notebooks, "01_first")
    write_notebook(workplace.notebooks, "02_second", *cells, parameters=parameters)
    assert workplace.main() == 2
    assert re.search(r"02_second.ipynb.*" + message, capsys.readouterr().err)
    assert not workplace.runs.exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"cells": [{"metadata": {}}]}'])
def test_what_is_not_a_notebook_is_refused(text, workplace, capsys):
    workplace.notebooks.mkdir()
    (workplace.notebooks / "01_first.ipynb").write_text(text)
    assert workplace.main() == 2
    assert "01_first.ipynb is not a notebook" in capsys.readouterr().err


def test_a_notebook_needs_exactly_one_parameters_cell(tmp_path):
    path = tmp_path / "n.ipynb"
    for count in (0, 2):
        cell = {"cell_type": "code", "source": ["a = 1"], "metadata": {"tags": ["parameters"]}}
        path.write_text(json.dumps({"cells": [cell] * count}))
        with pytest.raises(stamps.NotebookError, match=f"has {count} cells tagged 'parameters'"):
            stamps.read_parameters(path)


def test_broken_claims_are_refused_before_anything_starts(workplace, capsys):
    write_notebook(workplace.notebooks, "01_first")
    workplace.claims.write_text("- {id: one}")
    assert workplace.main() == 2
    assert "claims.yaml is not valid" in capsys.readouterr().err


# --- what is left, judged; what depends on what: notebooks played by a function ---------------------------------------


@pytest.fixture
def played(workplace, monkeypatch):
    """The runner with a stand-in for papermill: `played.results[name]` is what that notebook leaves."""
    workplace.results = {"01_first": {"a": 1.0}, "02_second": {"a": 32.0}}
    workplace.started = []

    def execute(path, output, failed, parameters):
        name = path.stem
        workplace.started.append(name)
        outcome = workplace.results[name]
        if isinstance(outcome, BaseException):
            raise outcome
        output.write_text(path.read_text())
        content = {"notebook": name, "profile": parameters["profile"], "metrics": outcome}
        write_text(workplace.run_folder / "results" / f"{name}.json", json.dumps(content))

    monkeypatch.setattr(runner, "_execute", execute)
    for name in workplace.results:
        write_notebook(workplace.notebooks, name, "# Text")
    return workplace


def restarted(place) -> list[str]:
    place.started.clear()
    assert place.main() == 0
    return list(place.started)


def test_an_expected_claim_that_does_not_hold_fails_the_run(played, capsys):
    played.results["01_first"] = {"a": 2.5}
    assert played.main() == 1
    assert "FAILED: 01_first: A is lower: does not hold (measured: 2.5)" in capsys.readouterr().err
    # All the same, the results and the report are complete.
    assert {"results.json", "report/index.html"} <= set(played.files())
    assert "does not hold" in (played.run_folder / "report" / "index.html").read_text()


@pytest.mark.parametrize(("value", "verdict"), [({"a": 1.9}, "too close to call"), ({"b": 1.0}, "not run")])
def test_an_expected_claim_that_was_not_shown_to_hold_fails_the_run(value, verdict, played, capsys):
    played.results["01_first"] = value
    assert played.main() == 1
    assert f"FAILED: 01_first: A is lower: {verdict}" in capsys.readouterr().err


def test_a_claim_that_is_not_expected_is_reported_and_no_more(played, capsys):
    played.results["02_second"] = {"a": 31.0}
    assert played.main() == 0
    assert "2 claims: 1 holds, 1 does not hold." in capsys.readouterr().out


def test_a_missing_result(played, monkeypatch, capsys):
    monkeypatch.setattr(runner, "_execute", lambda path, output, *_: output.write_text("executed"))
    assert played.main() == 1
    assert re.search(r"01_first.ipynb ran to its end, but wrote no result: .* is missing", capsys.readouterr().err)
    assert (played.run_folder / "01_first.failed.ipynb").read_text() == "executed"


def test_a_stale_result(played, monkeypatch, capsys):
    execute = runner._execute

    def execute_and_age(path, *others):
        execute(path, *others)
        os.utime(played.run_folder / "results" / f"{path.stem}.json", (1, 1))

    monkeypatch.setattr(runner, "_execute", execute_and_age)
    assert played.main() == 1
    assert "its result is stale" in capsys.readouterr().err
    assert not (played.run_folder / "stamps").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a result file"),
        ("[]", "is not a result file"),
        ('{"notebook": "n", "profile": "embedded", "metrics": [1]}', "is not a result file"),
        ('{"notebook": "n", "profile": "embedded", "metrics": {"a": "1"}}', "is not a result file"),
        ('{"notebook": "n", "profile": "embedded", "metrics": {}}', "holds no metrics"),
        ('{"notebook": "n", "profile": "embedded", "metrics": {"a": NaN}}', "metrics that are not finite"),
        ('{"notebook": "m", "profile": "embedded", "metrics": {"a": 1}}', r"belongs to \('m', 'embedded'\)"),
    ],
)
def test_a_result_that_is_none(text, message, tmp_path):
    (tmp_path / "n.json").write_text(text)
    with pytest.raises(runner.RunError, match=message):
        runner._read_result(tmp_path / "n.json", "n", "embedded")


def test_only_what_changed_runs_again(played):
    assert restarted(played) == ["01_first", "02_second"]
    assert restarted(played) == []
    write_notebook(played.notebooks, "02_second", "# Another text")
    assert restarted(played) == ["02_second"]
    (played.run_folder / "01_first.ipynb").unlink()
    assert restarted(played) == ["01_first"]
    (played.run_folder / "results" / "02_second.json").write_text("{")
    assert restarted(played) == ["02_second"]
    path = played.run_folder / "results" / "02_second.json"
    path.write_text(path.read_text().replace("32.0", "31.0"))  # an edit that keeps its size
    assert restarted(played) == ["02_second"]
    played.claims.write_text(CLAIMS.replace("right: 2.0", "right: 3.0"))
    assert restarted(played) == ["01_first"]
    assert restarted(played) == []


def test_pages_are_rendered_again_when_their_code_or_their_notebook_changes(played, monkeypatch, tmp_path):
    rendered = []
    write_page = pages.write_page

    def counted(executed, *others):
        rendered.append(executed.stem)
        write_page(executed, *others)

    monkeypatch.setattr(pages, "write_page", counted)
    both = ["01_first", "02_second"]
    assert restarted(played) == both and rendered == both
    rendered.clear()
    assert restarted(played) == [] and rendered == []
    changed = tmp_path / "pages.py"
    changed.write_text("# changed\n")
    monkeypatch.setattr(pages, "__file__", str(changed))
    assert restarted(played) == [] and rendered == both
    write_notebook(played.notebooks, "02_second", "# A third text")
    rendered.clear()
    assert restarted(played) == ["02_second"] and rendered == ["02_second"]


def test_after_an_interruption_the_notebook_that_ran_runs_again(played):
    played.results["02_second"] = KeyboardInterrupt()
    assert played.main() == 130
    assert not (played.run_folder / "results.json").exists()
    (played.run_folder / "02_second.failed.ipynb").write_text("of an earlier run")
    played.results["02_second"] = {"a": 32.0}
    assert restarted(played) == ["02_second"]
    assert not (played.run_folder / "02_second.failed.ipynb").exists()


def test_a_changed_parameter_runs_only_notebooks_that_have_it(played):
    write_notebook(played.notebooks, "02_second", parameters='profile = ""\noutput_folder = ""\n')
    assert restarted(played) == ["01_first", "02_second"]
    played.started.clear()
    assert played.main("-p", "samples=8") == 0
    assert played.started == ["01_first"]


# --- what a notebook depends on ---------------------------------------------------------------------------------------


@pytest.fixture
def dependent(workplace, tmp_path, monkeypatch):
    """digests() of two notebooks, and a copy of all that they depend on."""
    for module, constant, name in ((fingerprint, "PACKAGE", "slimllm_nb"), (stamps, "DATA", "data")):
        shutil.copytree(getattr(module, constant), tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(module, constant, tmp_path / name)
    shutil.copy(stamps.LOCK, tmp_path / "requirements.lock")
    monkeypatch.setattr(stamps, "LOCK", tmp_path / "requirements.lock")
    (tmp_path / "mine.txt").write_text("A text of one's own.")
    write_notebook(workplace.notebooks, "01_first", "print(5)")
    write_notebook(workplace.notebooks, "02_second", "%%time\nprint(6)", "print('%d'\n% 5)")  # no magic
    own = {"texts": {"mine": TextSource(files=[str(tmp_path / "mine.txt")])}}
    profile = profiles.load_profile("embedded").model_copy(update=own)

    def digests(profile=profile):
        fingerprint._code.cache_clear()
        paths = sorted(workplace.notebooks.glob("*.ipynb"))
        return {path.stem: stamps.digest(path, profile, {}) for path in paths} | {"dense": stamps.dense_digest(profile)}

    yield tmp_path, digests
    fingerprint._code.cache_clear()


NOTEBOOKS = {"01_first", "02_second"}


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("slimllm_nb/heads.py", NOTEBOOKS | {"dense"}),
        ("requirements.lock", NOTEBOOKS | {"dense"}),
        ("mine.txt", NOTEBOOKS | {"dense"}),
        ("data/ablations/plan.yaml", NOTEBOOKS),
        ("data/paper/table5_ablation_alpha.csv", NOTEBOOKS),
        ("data/tasks/analogies.yaml", NOTEBOOKS),
        ("data/zeroshot/embedded.json", NOTEBOOKS),
        ("data/paper/README.md", set()),
        ("data/gpu/card.json", set()),
        ("data/tasks/__pycache__/utils.cpython-311.pyc", set()),
    ],
)
def test_a_digest_follows_the_files_it_depends_on(file, changed, dependent):
    folder, digests = dependent
    before = digests()
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((path.read_bytes() if path.exists() else b"") + b"\n# changed\n")
    after = digests()
    assert {name for name in after if after[name] != before[name]} == changed


def test_a_digest_follows_the_profile_and_the_code_and_not_the_outputs(dependent, workplace):
    _, digests = dependent
    before = digests()
    other = profiles.load_profile("embedded").model_copy(update={"seed": 43})
    assert set(digests(other).items()).isdisjoint(before.items())
    path = workplace.notebooks / "01_first.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="5")]
    nbformat.write(notebook, path)
    assert digests() == before
    notebook.cells[1].source += "\nprint(6)"
    nbformat.write(notebook, path)
    assert digests()["01_first"] != before["01_first"]
