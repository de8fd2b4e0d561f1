"""The runner, on notebooks of a few lines: what it refuses, runs, keeps, skips and reports. No model is loaded."""

import html.parser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from slimllm_nb import paper, profiles, reproduce, stamps

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


OPTIONS = ["-p", "samples=16", "-p", "share=1"]


class Workplace:
    """A folder of notebooks, a folder of runs, and the command."""

    def __init__(self, folder: Path):
        self.notebooks, self.runs, self.claims = folder / "notebooks", folder / "runs", folder / "claims.yaml"
        self.run_folder = self.runs / "embedded"
        self.claims.write_text(CLAIMS)

    def patch(self, monkeypatch) -> None:
        monkeypatch.setenv("SLIMLLM_NB_RUNS", str(self.runs))
        monkeypatch.setattr(paper, "CLAIMS", self.claims)

    def main(self, *options: str) -> int:
        return reproduce.main(["--notebooks", str(self.notebooks), *options])

    def script(self, *options: str, after: str = "") -> list[str]:
        """The command as a process of its own; `after` is run at its end."""
        lines = [
            "import pathlib, sys",
            "from slimllm_nb import paper, reproduce",
            f"paper.CLAIMS = pathlib.Path({str(self.claims)!r})",
            f"code = reproduce.main({['--notebooks', str(self.notebooks), *options]!r})",
            after,
            "sys.exit(code)",
        ]
        return [sys.executable, "-c", "\n".join(lines)]

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.run_folder).as_posix() for path in self.run_folder.rglob("*.*"))


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Workplace:
    place = Workplace(tmp_path)
    place.patch(monkeypatch)
    return place


# --- real runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two notebooks that were run by the command, and what it printed."""
    place = Workplace(tmp_path_factory.mktemp("finished"))
    first = save("01_first", '{"a": 1.5, "samples": samples, "pid": os.getpid()}')
    picture = "from IPython.display import Image\nImage(data=bytes.fromhex('89504e470d0a1a0a'), format='png')"
    text = "# The first\n> Eq. 3: $x < y$ and\n\n$$\\frac{1}{2}$$\n\nNext: [02](02_second.ipynb)"
    write_notebook(place.notebooks, "01_first", text, first, picture, "left_over = 1")
    second = save("02_second", '{"a": samples, "pid": os.getpid(), "kept": float("left_over" in globals())}')
    write_notebook(place.notebooks, "02_second", second, parameters='profile = ""\noutput_folder = ""\nsamples = 8\n')
    with pytest.MonkeyPatch.context() as monkeypatch:
        place.patch(monkeypatch)
        done = subprocess.run(place.script(*OPTIONS), capture_output=True, text=True)
    return place, done


def test_a_run_goes_through_all_notebooks_and_ends_in_verdicts(finished):
    place, done = finished
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert (lines[0], lines[2]) == ("[1/2] 01_first ...", "[2/2] 02_second ...")
    assert re.fullmatch(r"\[1/2\] 01_first: \d+\.\d s", lines[1])
    assert re.fullmatch(r"\[2/2\] 02_second: \d+\.\d s", lines[3])
    assert "2 claims: 1 holds, 1 does not hold." in lines
    assert lines[-1].startswith("Report: ") and Path(lines[-1].removeprefix("Report: ")).is_file()
    assert place.files() == [
        "01_first.ipynb",
        "02_second.ipynb",
        "report/01_first.html",
        "report/02_second.html",
        "report/index.html",
        "results.json",
        "results/01_first.json",
        "results/02_second.json",
        "stamps/01_first.json",
        "stamps/02_second.json",
    ]


def test_each_notebook_has_its_own_kernel_and_its_parameters(finished):
    place, _ = finished
    results = json.loads((place.run_folder / "results.json").read_text())
    first, second = results["metrics"]["01_first"], results["metrics"]["02_second"]
    assert first["pid"] != second["pid"] and second["kept"] == 0
    assert first["samples"] == second["a"] == 16
    injected = nbformat.read(place.run_folder / "01_first.ipynb", as_version=4).cells[1]
    assert injected.metadata.tags == ["injected-parameters"] and "share = 1" in injected.source
    assert "share" not in nbformat.read(place.run_folder / "02_second.ipynb", as_version=4).cells[1].source


def test_results_hold_verdicts_with_what_was_measured(finished):
    place, _ = finished
    results = json.loads((place.run_folder / "results.json").read_text())
    assert results["profile"] == "embedded" and list(results["seconds"]) == ["01_first", "02_second"]
    assert all(0 < seconds < 60 for seconds in results["seconds"].values())
    assert [(one["id"], one["verdict"], one["measured"]) for one in results["verdicts"]] == [
        ("one", "holds", "1.5"),
        ("two", "does not hold", "16"),
    ]


class Links(html.parser.HTMLParser):
    """Every address a page refers to."""

    def __init__(self, page: Path):
        super().__init__()
        self.found, self.tags = [], set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.found += [value for name, value in attributes if name in {"href", "src", "srcset", "data", "action"}]


def test_the_report_needs_nothing_from_elsewhere(finished):
    report = finished[0].run_folder / "report"
    for page in report.glob("*.html"):
        links = Links(page)
        assert not {"script", "link", "iframe"} & links.tags
        assert "@import" not in page.read_text() and "url(" not in page.read_text()
        for address in links.found:
            if not address.startswith(("data:image/", "#")):
                assert (report / address).is_file(), f"{page.name} refers to {address}"
    first = Links(report / "01_first.html")
    assert {"index.html", "02_second.html"} <= set(first.found)
    assert {"math", "mfrac", "blockquote", "img"} <= first.tags


def test_a_second_run_does_nothing_and_is_quick(finished, monkeypatch):
    place, _ = finished
    place.patch(monkeypatch)
    check = "heavy = {'torch', 'transformers', 'papermill', 'pandas'} & set(sys.modules)\nassert not heavy, heavy"
    start = time.perf_counter()
    done = subprocess.run(place.script(*OPTIONS, after=check), capture_output=True, text=True)
    assert time.perf_counter() - start < 10  # about one second where nothing else runs
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["[1/2] 01_first: up to date", "[2/2] 02_second: up to date"]


def test_a_notebook_whose_last_cell_fails(workplace, capsys):
    write_notebook(workplace.notebooks, "01_first", save("01_first", '{"a": 1.0}'), "raise ValueError('too late')")
    write_notebook(workplace.notebooks, "02_second", save("02_second", '{"a": 32.0}'))
    stale = workplace.run_folder / "results.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier run")
    assert workplace.main() == 1
    printed = capsys.readouterr()
    assert "02_second" not in printed.out
    assert "FAILED: 01_first.ipynb: cell In [4] raised ValueError: too late" in printed.err
    # No results.json, no stamp and no report: nothing of it looks complete.
    assert workplace.files() == ["01_first.failed.ipynb", "results/01_first.json"]
    failed = nbformat.read(workplace.run_folder / "01_first.failed.ipynb", as_version=4)
    assert failed.cells[-1].outputs[-1].ename == "ValueError"


def test_a_notebook_that_ends_itself_is_no_success(workplace, capsys):
    leave = "import sys\nsys.exit(0)"
    write_notebook(workplace.notebooks, "01_first", save("01_first", '{"a": 1.0}'), leave, "print('never')")
    assert workplace.main() == 1
    assert "FAILED: 01_first.ipynb: code cell 4 of 5 ended the notebook" in capsys.readouterr().err
    assert workplace.files() == ["01_first.failed.ipynb", "results/01_first.json"]


def test_a_kernel_that_dies(workplace, capsys):
    write_notebook(workplace.notebooks, "01_first", save("01_first", '{"a": 1.0}'), "os._exit(1)", "print('never')")
    assert workplace.main() == 1
    assert "01_first.ipynb: its kernel died" in capsys.readouterr().err
    assert workplace.files() == ["01_first.failed.ipynb", "results/01_first.json"]


def test_an_interrupted_run_goes_on(workplace, tmp_path):
    ready = tmp_path / "ready"
    wait = f"import os, pathlib, time\npathlib.Path({str(ready)!r}).write_text(str(os.getpid()))\ntime.sleep(120)"
    write_notebook(workplace.notebooks, "01_first", save("01_first", '{"a": 1.0}'))
    write_notebook(workplace.notebooks, "02_second", wait, save("02_second", '{"a": 32.0}'))
    process = subprocess.Popen(workplace.script(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: ready.exists() and ready.read_text())
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Interrupted. The same command goes on with the notebook that was running." in errors
    wait_for(lambda: not Path(f"/proc/{ready.read_text()}").exists())
    files = ["01_first.ipynb", "results/01_first.json", "stamps/01_first.json"]
    assert workplace.files() == files and not list(workplace.run_folder.glob(".*"))
    write_notebook(workplace.notebooks, "02_second", save("02_second", '{"a": 32.0}'))
    done = subprocess.run(workplace.script(), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[1/2] 01_first: up to date\n[2/2] 02_second ...\n[2/2] 02_second: ")


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


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
    assert re.search("Nothing was run: .*" + message, capsys.readouterr().err)
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
        paper.write_text(workplace.run_folder / "results" / f"{name}.json", json.dumps(content))

    monkeypatch.setattr(reproduce, "_execute", execute)
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
    monkeypatch.setattr(reproduce, "_execute", lambda *_: None)
    assert played.main() == 1
    assert re.search(r"01_first.ipynb ran to its end, but wrote no result: .* is missing", capsys.readouterr().err)


def test_a_stale_result(played, monkeypatch, capsys):
    execute = reproduce._execute

    def execute_and_age(path, *others):
        execute(path, *others)
        os.utime(played.run_folder / "results" / f"{path.stem}.json", (1, 1))

    monkeypatch.setattr(reproduce, "_execute", execute_and_age)
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
    with pytest.raises(reproduce.RunError, match=message):
        reproduce._read_result(tmp_path / "n.json", "n", "embedded")


def test_only_what_changed_runs_again(played):
    assert restarted(played) == ["01_first", "02_second"]
    assert restarted(played) == []
    write_notebook(played.notebooks, "02_second", "# Another text")
    assert restarted(played) == ["02_second"]
    (played.run_folder / "01_first.ipynb").unlink()
    assert restarted(played) == ["01_first"]
    (played.run_folder / "results" / "02_second.json").write_text("{")
    assert restarted(played) == ["02_second"]
    played.claims.write_text(CLAIMS.replace("right: 2.0", "right: 3.0"))
    assert restarted(played) == ["01_first"]
    assert restarted(played) == []


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
    """digests() of two notebooks: one imports heads alone, the other pruning, which imports heads and channels."""
    for constant, name in (("PACKAGE", "slimllm_nb"), ("DATA", "data")):
        original = getattr(stamps, constant)
        shutil.copytree(original, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(stamps, constant, tmp_path / name)
    shutil.copy(stamps.LOCK, tmp_path / "requirements.lock")
    monkeypatch.setattr(stamps, "LOCK", tmp_path / "requirements.lock")
    write_notebook(workplace.notebooks, "01_first", "from slimllm_nb import heads")
    write_notebook(workplace.notebooks, "02_second", "%%time\nfrom slimllm_nb.pruning import prune")
    profile = profiles.load_profile("embedded")

    def digests(profile=profile):
        paths = sorted(workplace.notebooks.glob("*.ipynb"))
        return {path.stem: stamps.digest(path, profile, {}) for path in paths}

    return tmp_path, digests


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("slimllm_nb/heads.py", {"01_first", "02_second"}),
        ("slimllm_nb/channels.py", {"02_second"}),
        ("slimllm_nb/pruning.py", {"02_second"}),
        ("slimllm_nb/gguf_file.py", set()),
        ("requirements.lock", {"01_first", "02_second"}),
        ("data/paper/table5_ablation_alpha.csv", {"01_first", "02_second"}),
        ("data/paper/README.md", set()),
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


@pytest.mark.parametrize(
    ("source", "modules"),
    [
        ("import slimllm_nb.ratios", {"ratios"}),
        ("from slimllm_nb.ratios import allocate as a", {"ratios"}),
        ("if True:\n    from slimllm_nb import ratios, regression", {"ratios", "regression"}),
        ("%matplotlib inline\n!ls\nfrom slimllm_nb import ratios", {"ratios"}),
        ("from slimllm_nb import ratios\ntext = ('%d'\n% 5)", {"ratios"}),
        ("print('slimllm_nb.ratios')", set()),
    ],
)
def test_imports_are_found_wherever_they_stand(source, modules, tmp_path):
    write_notebook(tmp_path, "n", source)
    found = stamps._modules(tmp_path / "n.ipynb", stamps.read_cells(tmp_path / "n.ipynb"))
    assert {path.stem for path in found} == modules | {"__init__"}
