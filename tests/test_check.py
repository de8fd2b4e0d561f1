"""make check: executed notebooks run again on a copy and are compared, nothing is overwritten; bars elsewhere."""

import re
import subprocess

import nbformat
import pytest

from slimllm_nb.progress import FOLLOWED, bar
from slimllm_nb.reproduce import check
from workplace import save, write_notebook


@pytest.mark.notebook
def test_executed_notebooks_are_compared_and_left_alone(workplace, capsys):
    write_notebook(workplace.notebooks, "01_first", "print('7 of 9')", save("01_first", '{"a": 1.0}'))
    path = workplace.notebooks / "01_first.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].metadata["tags"] = ["nbval-check-output"]
    nbformat.write(notebook, path)
    assert check.main([]) == 2
    assert "has no executed notebook; run make reproduce first" in capsys.readouterr().err
    assert workplace.run("01_first") == 0
    before = {name: (workplace.run_folder / name).read_bytes() for name in workplace.files()}
    assert check.main([]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"01_first: 1 of 1 checked cells are the same, metrics the same \(\d+ s\)", printed)
    executed = workplace.run_folder / "01_first.ipynb"
    executed.write_text(executed.read_text().replace("7 of 9\\n", "6 of 9\\n"))
    before["01_first.ipynb"] = executed.read_bytes()
    assert check.main([]) == 1
    printed = capsys.readouterr()
    assert "01_first: 0 of 1 checked cells are the same" in printed.out and "6 of 9" in printed.err
    assert {name: (workplace.run_folder / name).read_bytes() for name in workplace.files()} == before


def test_what_a_killed_nbval_said_is_shown(workplace, capsys, monkeypatch):
    write_notebook(workplace.run_folder, "01_first", save("01_first", '{"a": 1.0}'))
    killed = subprocess.CompletedProcess([], -9, "", "Killed: out of memory")
    monkeypatch.setattr(check.subprocess, "run", lambda *_, **__: killed)
    assert check.main([]) == 1
    printed = capsys.readouterr()
    assert "01_first: 0 of 0 checked cells are the same, no result to compare" in printed.out
    assert "Killed: out of memory" in printed.err


def test_an_unknown_profile(capsys):
    assert check.main(["--profile", "llama-8b"]) == 2
    assert "Stopped: unknown profile 'llama-8b'" in capsys.readouterr().err


def test_bars_go_where_the_environment_says(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(FOLLOWED, str(tmp_path / "screen"))
    for _ in bar(range(4), progress=False, desc="perplexity", mininterval=0):
        pass
    assert re.search(r"perplexity: +\d+%\|.*\| \d/4 ", (tmp_path / "screen").read_text())
    monkeypatch.delenv(FOLLOWED)
    for _ in bar(range(4), progress=False, desc="perplexity"):
        pass
    assert capsys.readouterr().err == ""
