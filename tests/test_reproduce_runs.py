"""The runner on real kernels: notebooks of a few lines from start to end, that fail, die or are interrupted."""

import html.parser
import json
import re
import signal
import subprocess
import time
from pathlib import Path

import nbformat
import pytest

from workplace import Workplace, save, write_notebook

pytestmark = pytest.mark.notebook
OPTIONS = ["-p", "samples=16", "-p", "share=1"]
PATIENCE = 900  # seconds; reached only where something hangs, however slow the machine


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
    assert all(seconds > 0 for seconds in results["seconds"].values())
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


def test_a_second_run_does_nothing_and_loads_nothing_heavy(finished, monkeypatch):
    place, _ = finished
    place.patch(monkeypatch)
    check = "heavy = {'torch', 'transformers', 'papermill', 'pandas'} & set(sys.modules)\nassert not heavy, heavy"
    done = subprocess.run(place.script(*OPTIONS, after=check), capture_output=True, text=True)
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on(number, workplace, tmp_path):
    ready = tmp_path / "ready"
    wait = f"import os, pathlib, time\npathlib.Path({str(ready)!r}).write_text(str(os.getpid()))"
    write_notebook(workplace.notebooks, "01_first", save("01_first", '{"a": 1.0}'))
    write_notebook(
        workplace.notebooks, "02_second", wait, "while True: time.sleep(1)", save("02_second", '{"a": 32.0}')
    )
    process = subprocess.Popen(workplace.script(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: process.poll() is not None or (ready.exists() and ready.read_text()))
        assert process.poll() is None, process.communicate()[1]
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE)
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


def wait_for(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
