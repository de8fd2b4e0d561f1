"""Write requirements.lock (every version with its hashes) and environment.yml (the same versions for conda users).

Neither file names a machine or a package index. Versions already locked are kept where pyproject.toml allows them;
delete requirements.lock first to take the newest ones.
"""

import re
import subprocess
import sys
import tomllib

from slimllm_nb.files import ROOT, write_text

LOCK = ROOT / "requirements.lock"
ENVIRONMENT = ROOT / "environment.yml"
NOT_LOCKED = {"llama-cpp"}  # compiled where it is installed
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


def compile_lock() -> None:
    """Resolve pyproject.toml with its extras for Python 3.11 to 3.13 on every system."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
    command += ["--generate-hashes", "--no-emit-index-url", "--no-emit-find-links", "--no-annotate"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    command += [f"--extra={name}" for name in project["optional-dependencies"] if name not in NOT_LOCKED]
    command += ["--custom-compile-command", "make lock", "pyproject.toml", "--output-file", LOCK.name]
    subprocess.run(command, cwd=ROOT, check=True)


def write_environment() -> None:
    """The lock's versions and markers, without the hashes, which conda's list cannot hold."""
    pins = re.findall(r"^(\S+==[^\\\n]+?)\s*\\?$", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    lines = [f'      - "{pin}"\n' for pin in pins]
    write_text(ENVIRONMENT, HEADER + "".join(lines))


if __name__ == "__main__":
    compile_lock()
    write_environment()
