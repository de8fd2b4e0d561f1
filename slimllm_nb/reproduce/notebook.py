"""Run one notebook in a kernel of its own: python -m slimllm_nb.reproduce.notebook NOTEBOOK EXECUTED

make's recipe. papermill's own command takes sys.exit for a success, injects what a notebook does not know, and shows
nothing of a long cell. Parameters stand in `inputs` beside EXECUTED, which appears at the end, as old as its start.
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from slimllm_nb.command import command
from slimllm_nb.files import ROOT
from slimllm_nb.progress import FOLLOWED
from slimllm_nb.reproduce.claims import PaperError
from slimllm_nb.reproduce.start import INPUTS, NotebookError, read_parameters
from slimllm_nb.reproduce.verdicts import read_result


@command
def main(arguments: list[str] | None = None) -> int:
    source, target = map(Path, arguments or sys.argv[1:])
    name, folder = source.stem, target.parent
    given = json.loads((folder / INPUTS).read_text(encoding="utf-8"))["parameters"]
    parameters = {key: given[key] for key in read_parameters(source) if key in given}
    partial, failed = folder / f".{name}.partial.ipynb", folder / f"{name}.failed.ipynb"
    made = ("results.json", "report/index.html", f"report/{name}.html", f"results/{name}.json")
    for stale in (*made, target.name, failed.name):  # from here on nothing of an earlier run looks complete
        (folder / stale).unlink(missing_ok=True)
    print(f"{name} ...", flush=True)
    start = time.time_ns()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # make passes it on: the kernel is to end too
    try:
        execute(source, partial, parameters)
        read_result(folder, name, folder.name)  # the profile's
        os.utime(partial, ns=(start, start))  # what is edited while it runs is newer
        partial.replace(target)
    except (NotebookError, PaperError) as error:
        partial.replace(failed)
        raise NotebookError(f"{source.name}: {error}. See {failed}") from error
    finally:
        partial.unlink(missing_ok=True)
    print(f"{name}: {(time.time_ns() - start) / 1e9:.1f} s", flush=True)
    return 0


def execute(source: Path, output: Path, parameters: dict) -> None:
    """Raises: NotebookError for a cell that failed or ended the notebook, and for a kernel that died."""
    os.environ[FOLLOWED] = _screen()
    import papermill
    from nbclient.exceptions import DeadKernelError

    options = {"kernel_name": "python3", "language": "python", "cwd": ROOT, "progress_bar": False}
    options["extra_arguments"] = ["--log-level=ERROR"]  # the kernel's: it warns at every start that it talks over TCP
    try:
        executed = papermill.execute_notebook(source, output, parameters=parameters, **options)
    except papermill.PapermillExecutionError as error:
        raise NotebookError(f"cell In [{error.exec_count}] raised {error.ename}: {error.evalue}") from error
    except DeadKernelError as error:
        raise NotebookError(f"its kernel died ({error}), perhaps for lack of memory") from error
    states = [cell.metadata.papermill.status for cell in executed.cells if cell.cell_type == "code"]
    if ended := [number for number, state in enumerate(states, start=1) if state != "completed"]:
        raise NotebookError(f"code cell {ended[0]} of {len(states)} ended the notebook")


def _screen() -> str:
    """A path by which a kernel, whose own standard error goes into its notebook, writes to this process's."""
    linux = Path(f"/proc/{os.getpid()}/fd/2")
    path = linux if linux.exists() else Path(os.ttyname(2) if os.isatty(2) else os.devnull)
    with suppress(OSError), path.open("a"):  # a socket cannot be opened a second time
        return str(path)
    return os.devnull


if __name__ == "__main__":
    sys.exit(main())
