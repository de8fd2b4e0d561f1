"""The progress of a notebook on the screen, while its kernel writes its bars to a file."""

import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimllm_nb.progress import FOLLOWED

SECONDS = 5.0  # between two lines of the log


@contextmanager
def followed(prefix: str = "    ") -> Iterator[None]:
    """Inside it, kernels that are started write their bars to a file, and the last state is printed now and then."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "progress")
        path.touch()
        before = os.environ.get(FOLLOWED)
        os.environ[FOLLOWED] = str(path)
        done = threading.Event()
        thread = threading.Thread(target=_print_changes, args=(path, done, prefix), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            os.environ.pop(FOLLOWED)
            if before is not None:
                os.environ[FOLLOWED] = before


def _print_changes(path: Path, done: threading.Event, prefix: str) -> None:
    shown, read = "", 0
    while not done.wait(SECONDS):
        with path.open(encoding="utf-8", errors="replace") as stream:
            stream.seek(read)
            new = stream.read()
            read = stream.tell()
        states = [state.strip() for state in re.split(r"[\r\n]+", new) if state.strip()]
        if states and states[-1] != shown:
            shown = states[-1]
            print(f"{prefix}{shown}", file=sys.stderr, flush=True)
