"""What runs on the pretend accelerator (pretend.py): in processes of its own, since it cannot be uninstalled."""

import json
import subprocess
import sys

import pytest

from slimllm_nb.files import ROOT

pytestmark = pytest.mark.slow


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["pretended_programs", "pretended_pruning", "pretended_uses", "pretended_memory"])
def test_on_the_pretend_accelerator(name):
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"tests/{name}.py")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_proof_of_a_gpu_runs_on_it():
    program = (
        "import sys; sys.path.insert(0, 'tests'); import pretend; pretend.install(); import runpy; "
        "sys.argv = ['gpu_proof.py', '--small', '--device', 'pretend']; "
        "runpy.run_path('tools/gpu_proof.py', run_name='__main__')"
    )
    done = run("-c", program)
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(steps) == 8, done.stdout[-3000:] + done.stderr[-3000:]
    assert not [step for step in steps if "FAILED" in step]
    same = next(step for step in steps if step["step"] == "the_same_heads_and_channels_as_on_the_cpu")
    assert set(map(type, same.values())) >= {bool}
    assert all(value is True for name, value in same.items() if name not in ("step", "seconds")), same
