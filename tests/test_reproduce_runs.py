"""make reproduce on real kernels: notebooks of a few lines from start to end, edited, failing, dying, interrupted."""

import html.parser
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from slimllm_nb.reproduce import notebook
from workplace import Workplace, make, save, write_notebook

pytestmark = pytest.mark.notebook
OPTIONS = "OPTIONS=-p samples=16 -p share=1"
PATIENCE = 900  # seconds; reached only where something hangs, however slow the machine
PICTURE = "from IPython.display import Image\nImage(data=bytes.fromhex('89504e470d0a1a0a'), format='png')"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two notebooks that were run by the command, and what it printed."""
    place = Workplace(tmp_path_factory.mktemp("finished"))
    place.clone()
    first = save("01_first", '{"a": 1.5, "samples": samples, "pid": os.getpid()}')
    text = "# The first\n> Eq. 3: $x < y$ and\n\n$$\\frac{1}{2}$$\n\nNext: [02](02_second.ipynb)"
    write_notebook(place.notebooks, "01_first", text, first, PICTURE, "left_over = 1")
    second = save("02_second", '{"a": samples, "pid": os.getpid(), "kept": float("left_over" in globals())}')
    write_notebook(place.notebooks, "02_second", second, parameters='profile = ""\noutput_folder = ""\nsamples = 8\n')
    return place, place.reproduce(OPTIONS)


def test_a_run_goes_through_all_notebooks_and_ends_in_verdicts(finished):
    place, done = finished
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("make")]
    assert (lines[0], lines[2]) == ("01_first ...", "02_second ...")
    assert re.fullmatch(r"01_first: \d+\.\d s", lines[1]) and re.fullmatch(r"02_second: \d+\.\d s", lines[3])
    assert "2 claims: 1 holds, 1 does not hold." in lines
    assert lines[-1].startswith("Report: ") and Path(lines[-1].removeprefix("Report: ")).is_file()
    assert place.files() == [
        "01_first.ipynb",
        "02_second.ipynb",
        "report/01_first.html",
        "report/02_second.html",
        "report/figure2.html",
        "report/index.html",
        *(f"report/table{number}.html" for number in range(1, 10)),
        "results.json",
        "results/01_first.json",
        "results/02_second.json",
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


def runs_again(place: Workplace, options: str = OPTIONS) -> list[str]:
    """The notebooks that make would run, by its dry run after the real first step, which waits for no torch."""
    environment = os.environ | {"SLIMLLM_NB_RUNS": str(place.runs)}
    code = "import sys\nfrom slimllm_nb.reproduce import start\nassert start.main(sys.argv[1:]) == 0"
    code += "\nassert not {'papermill', 'pandas', 'torch'} & set(sys.modules)"
    command = [sys.executable, "-c", code, *options.removeprefix("OPTIONS=").split()]
    subprocess.run(command, cwd=place.root, env=environment, check=True, capture_output=True)
    told = make("notebooks-and-verdicts", "-n", folder=place.root)
    done = subprocess.run(told, env=environment, check=True, capture_output=True, text=True)
    return re.findall(r"reproduce\.notebook \S*/(\w+)\.ipynb", done.stdout)


def test_what_was_edited_makes_the_right_notebooks_run_again(finished):
    place, done = finished
    assert done.returncode == 0
    both = ["01_first", "02_second"]
    assert runs_again(place) == []
    assert runs_again(place, "-p samples=17") == both
    assert runs_again(place) == both  # the parameters of before, but what they gave is not known to be
    for name in both:
        os.utime(place.run_folder / f"{name}.ipynb")
    assert runs_again(place) == []
    os.utime(place.notebooks / "02_second.ipynb")
    assert runs_again(place) == ["02_second"]
    (place.run_folder / "results" / "01_first.json").unlink()
    assert runs_again(place) == both
    os.utime(place.run_folder / "02_second.ipynb")
    assert runs_again(place) == ["01_first"]
    plan = place.root / "data" / "ablations" / "plan.yaml"
    plan.write_text(plan.read_text() + "# edited\n")
    assert runs_again(place) == both


# --- notebooks that do not end well -----------------------------------------------------------------------------------


def test_a_notebook_whose_last_cell_fails(workplace, capsys):
    write_notebook(workplace.notebooks, "01_first", save("01_first", '{"a": 1.0}'), "raise ValueError('too late')")
    for stale in ("results.json", "01_first.ipynb"):
        (workplace.run_folder / stale).parent.mkdir(parents=True, exist_ok=True)
        (workplace.run_folder / stale).write_text("of an earlier run")
    assert workplace.run("01_first") == 2
    assert "Stopped: 01_first.ipynb: cell In [4] raised ValueError: too late. See " in capsys.readouterr().err
    # No results.json and no executed notebook: nothing of it looks complete.
    assert workplace.files() == ["01_first.failed.ipynb", "results/01_first.json"]
    failed = nbformat.read(workplace.run_folder / "01_first.failed.ipynb", as_version=4)
    assert failed.cells[-1].outputs[-1].ename == "ValueError"


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("import sys\nsys.exit(0)", "01_first.ipynb: code cell 4 of 5 ended the notebook"),
        ("os._exit(1)", "01_first.ipynb: its kernel died"),
        ("(folder / '01_first.json').unlink()", "wrote no result: "),
    ],
)
def test_a_notebook_that_ends_otherwise_is_no_success(cell, message, workplace, capsys):
    write_notebook(workplace.notebooks, "01_first", save("01_first", '{"a": 1.0}'), cell, "print('never')")
    assert workplace.run("01_first") == 2
    assert message in capsys.readouterr().err
    assert "01_first.ipynb" not in workplace.files() and "01_first.failed.ipynb" in workplace.files()


def test_the_progress_of_a_cell_is_on_the_screen(workplace, capfd):
    steps = "import time\nfrom slimllm_nb.progress import bar\nfor _ in bar(range(4), progress=False): time.sleep(0.9)"
    write_notebook(workplace.notebooks, "01_first", steps, save("01_first", '{"a": 1.0}'))
    assert workplace.run("01_first") == 0
    assert re.search(r"\d+%\|.*\| \d/4 ", capfd.readouterr().err)
    executed = nbformat.read(workplace.run_folder / "01_first.ipynb", as_version=4)
    assert executed.cells[2].outputs == []
    assert notebook._screen()  # of this process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on(number, workplace, tmp_path):
    workplace.clone()
    ready = tmp_path / "ready"
    wait = f"import os, pathlib, time\npathlib.Path({str(ready)!r}).write_text(str(os.getpid()))"
    write_notebook(workplace.notebooks, "01_first", save("01_first", '{"a": 1.0}'))
    second = save("02_second", '{"a": 32.0}')
    write_notebook(workplace.notebooks, "02_second", wait, "while True: time.sleep(1)", second)
    with workplace.start() as process:
        wait_for(lambda: process.poll() is not None or (ready.exists() and ready.read_text()))
        assert process.poll() is None, process.communicate()[1]
        if number == signal.SIGINT:  # of the terminal: to make and all that it started
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    wait_for(lambda: not Path(f"/proc/{ready.read_text()}").exists())
    assert workplace.files() == ["01_first.ipynb", "results/01_first.json"]
    assert not list(workplace.run_folder.glob(".*"))
    write_notebook(workplace.notebooks, "02_second", second)
    done = workplace.reproduce()
    assert done.returncode == 0, done.stderr
    assert "02_second ..." in done.stdout and "01_first ..." not in done.stdout


def wait_for(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
