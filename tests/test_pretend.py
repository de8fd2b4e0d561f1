"""What runs on the pretend accelerator (pretend.py): in processes of its own, since it cannot be uninstalled."""

import json
import os
import subprocess
import sys

import pytest

from slimllm_nb.files import ROOT
from slimllm_nb.gpu.__main__ import main
from slimllm_nb.methods import method_names
from workplace import write_notebook

pytestmark = pytest.mark.slow


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": os.environ | environment}
    return subprocess.run([sys.executable, *command], **options)


@pytest.mark.parametrize("name", ["pretended_programs", "pretended_pruning", "pretended_uses"])
def test_on_the_pretend_accelerator(name):
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"tests/{name}.py")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_proof_of_a_gpu_runs_on_it(tmp_path):
    cells = "import sys\nfrom slimllm_nb import reproduce\nfrom slimllm_nb.devices import find_device"
    write_notebook(tmp_path / "notebooks", "00", cells, 'assert find_device().type == "pretend"')
    command = ["-m", "slimllm_nb.gpu", "--small", "--folder", str(tmp_path), "--notebooks", str(tmp_path / "notebooks")]
    done = run(*command, PYTHONPATH=str(ROOT / "tests" / "pretended"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "pretend.json").read_text())
    assert found["card"] == "pretend" and len(found["commit"]) >= 7 and found["date"]
    parts = found["parts"]
    assert parts["equal"]["same heads and channels"] == parts["equal"]["of"] == 2 * len(method_names())
    assert parts["embedded"]["20 %, float32"]["share of the CPU's channels"] == 1.0
    assert parts["notebooks"]["00"]["by"] == "papermill" and parts["large"]["bit for bit twice"]
    assert parts["disk"]["layers"] == 4 and parts["disk"]["peak GB"] > 0
    assert parts["speed"]["dense, batch 2, 8 tokens, tokens per second"][1] == 1.0
    trained = parts["training"]["channels in multiples of 8"]
    assert trained["tokens per second"] > 0 and trained["as estimated"] == 0.0  # of a gigabyte


def test_an_unknown_part_of_the_proof(capsys):
    assert main(["--parts", "equal,nothing"]) == 2
    assert "--parts: nothing; allowed: equal, embedded" in capsys.readouterr().err
