"""The runner, on tiny notebooks that need no model: order, refusals, resuming, what a failure leaves behind."""

import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml

from slimllm_nb import paper, profiles, reproduce, stamps

FIRST = """
from pathlib import Path
from slimllm_nb import paper, profiles

folder = Path(output_folder) if output_folder else profiles.run_folder(profile)
assert "marker" not in globals()
marker = 1
with open(folder.parent.parent / "order.txt", "a") as log:
    log.write(NAME + "\\n")
metrics = {"a": float(value), "b": 2.0}
verdicts = paper.judge(NAME, metrics, profile)
paper.save_results(folder, NAME, metrics, verdicts, profile=profile)
"""
CLAIM = {"claim": "A is lower than B", "source": "Table 6", "paper": "1 against 2", "left": "a", "right": "b"}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Two notebooks, a run folder, and a claim for the first notebook that holds while value < 2."""
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    for name in ("01_first", "02_second"):
        write_notebook(notebooks / f"{name}.ipynb")
    monkeypatch.setenv("SLIMLLM_NB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(paper, "CLAIMS", tmp_path / "claims.yaml")
    write_claims()
    return tmp_path


def write_claims(**changes):
    claim = CLAIM | {"id": "a", "notebook": "01_first", "relation": "less", "margin": 0, "expected": ["embedded"]}
    paper.CLAIMS.write_text(yaml.safe_dump([claim | changes]))


def write_notebook(path: Path, *, body: str = FIRST, parameters: str = 'profile = "embedded"\noutput_folder = ""\n'):
    name = path.stem
    if name == "01_first" and "value" not in parameters:
        parameters += "value = 1\n"
    cells = [
        nbformat.v4.new_markdown_cell("Area $a^2$"),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(f'NAME = "{name}"\n' + ("value = 1\n" if name != "01_first" else "")),
        nbformat.v4.new_code_cell(body),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


def run(world, *arguments) -> int:
    return reproduce.main(["--notebooks", str(world / "notebooks"), *arguments])


def order(world) -> list[str]:
    log = world / "order.txt"
    return log.read_text().split() if log.exists() else []


def test_a_run_and_what_depends_on_what(world, capsys, monkeypatch):
    folder = world / "runs" / "embedded"
    assert run(world) == 0
    assert order(world) == ["01_first", "02_second"]
    printed = capsys.readouterr().out
    assert re.search(r"\[1/2\] 01_first: \d+\.\d s", printed) and re.search(r"A is lower than B .* holds", printed)
    content = json.loads((folder / "results.json").read_text())
    assert content["profile"] == "embedded"
    assert content["metrics"] == {name: {"a": 1.0, "b": 2.0} for name in ("01_first", "02_second")}
    assert [(one["id"], one["verdict"]) for one in content["verdicts"]] == [("a", "holds")]
    for page in ("index.html", "01_first.html", "02_second.html"):
        text = (folder / "report" / page).read_text()
        assert not re.search(r"<script|<link|(src|href)=.?(https?:)?//", text)
    assert "<msup>" in (folder / "report" / "01_first.html").read_text()

    # Again: nothing is run, not even imported.
    monkeypatch.setattr(reproduce, "_execute", lambda *_: pytest.fail("a notebook was run"))
    assert run(world) == 0
    assert capsys.readouterr().out.count("up to date") == 2

    # What has changed is run again, and what that leaves alone is not.
    executed = []
    monkeypatch.setattr(reproduce, "_execute", lambda path, output, *_: fake(executed, folder, path, output))
    assert run(world, "-p", "value=0") == 1  # the fake's result is not what the claim asks for
    assert executed == ["01_first"]
    executed.clear()
    write_claims(margin=0.1)
    assert run(world, "-p", "value=0") == 1
    assert executed == ["01_first"]
    executed.clear()
    write_notebook(world / "notebooks" / "02_second.ipynb", body=FIRST + "\n# changed")
    assert run(world, "-p", "value=0") == 1
    assert executed == ["02_second"]
    executed.clear()
    (folder / "results" / "02_second.json").unlink()
    assert run(world, "-p", "value=0") == 1
    assert executed == ["02_second"]


def fake(executed, folder, path, output):
    """Stands for an execution: leaves the files, starts no kernel."""
    executed.append(path.stem)
    output.write_text(path.read_text())
    paper.save_results(folder, path.stem, {"a": 3.0, "b": 2.0}, [], profile="embedded")


def test_a_failing_notebook_is_kept_and_the_next_run_goes_on_there(world, capsys):
    folder = world / "runs" / "embedded"
    second = world / "notebooks" / "02_second.ipynb"
    write_notebook(second, body=FIRST + "\nraise RuntimeError('no luck')")
    assert run(world) == 1
    assert "cell In [4] raised RuntimeError: no luck" in re.sub(r"In \[\d+\]", "In [4]", capsys.readouterr().err)
    assert (folder / "02_second.failed.ipynb").exists()
    assert not (folder / "02_second.ipynb").exists() and not (folder / "results.json").exists()
    write_notebook(second)
    assert run(world) == 0
    assert order(world) == ["01_first", "02_second", "02_second"]
    assert not (folder / "02_second.failed.ipynb").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 1", "wrote no result"),
        ("import sys\nsys.exit(0)", r"raised SystemExit|wrote no result|kernel died"),
    ],
)
def test_a_notebook_without_a_result_is_a_failure(world, capsys, body, message):
    write_notebook(world / "notebooks" / "01_first.ipynb", body=body)
    (world / "notebooks" / "02_second.ipynb").unlink()
    assert run(world) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_stale_result_is_a_failure(world, capsys, monkeypatch):
    folder = world / "runs" / "embedded"
    paper.save_results(folder, "01_first", {"a": 1.0}, [], profile="embedded")
    old = folder / "results" / "01_first.json"
    with pytest.raises(reproduce.RunError, match="stale"):
        reproduce._read_result(old, "01_first", "embedded", old.stat().st_mtime_ns + 1)
    with pytest.raises(reproduce.RunError, match="belongs to"):
        reproduce._read_result(old, "02_second", "embedded")


def test_an_expected_claim_that_does_not_hold_fails_the_run(world, capsys, monkeypatch):
    folder = world / "runs" / "embedded"
    monkeypatch.setattr(reproduce, "_execute", lambda path, output, *_: fake([], folder, path, output))
    assert run(world) == 1
    assert "FAILED: 01_first: A is lower than B: does not hold" in capsys.readouterr().err
    write_claims(expected=[])
    assert run(world) == 0


def test_an_interrupted_run_says_so(world, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "_execute", interrupt)
    assert run(world) == 130
    assert "goes on" in capsys.readouterr().err
    assert not list((world / "runs" / "embedded").glob("*.ipynb"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "llama"], r"unknown profile 'llama'; allowed: .*embedded"),
        (["-p", "velue=2"], r"no notebook has a parameter 'velue'; allowed: value"),
        (["-p", "value=high"], r"the value must be int, like the default 1; it is str"),
        (["-p", "value"], "give it as name=value"),
        (["-p", "profile=embedded"], "profile is set by --profile"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(world, capsys, arguments, message):
    assert run(world, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("Nothing was run") and re.search(message, error)
    assert not (world / "runs").exists()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("value = 1 + 1", "only lines of the form name = literal"),
        ("value = 1", "has no profile"),
    ],
)
def test_a_parameters_cell_that_is_not_plain_is_refused(world, capsys, parameters, message):
    write_notebook(world / "notebooks" / "01_first.ipynb", parameters=parameters)
    assert run(world) == 2
    assert message in capsys.readouterr().err


def test_a_changed_module_counts_only_where_it_is_imported(world, monkeypatch, tmp_path):
    package = tmp_path / "slimllm_nb"
    package.mkdir()
    for name in ("__init__", "paper", "profiles", "heads"):
        (package / f"{name}.py").write_text((stamps.PACKAGE / f"{name}.py").read_text())
    monkeypatch.setattr(stamps, "PACKAGE", package)
    profile, path = profiles.load_profile("embedded"), world / "notebooks" / "01_first.ipynb"
    before = stamps.digest(path, profile, {})
    (package / "heads.py").write_text("# not imported by the notebook")
    assert stamps.digest(path, profile, {}) == before
    (package / "profiles.py").write_text((package / "profiles.py").read_text() + "\n# imported")
    assert stamps.digest(path, profile, {}) != before
