"""Progress bars of what takes long: on the screen, or in a file that the runner follows while a notebook runs."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from tqdm import tqdm
from tqdm.auto import tqdm as shown

FOLLOWED = "SLIMLLM_NB_PROGRESS"  # names the file; a notebook's own outputs stay without bars


def bar(iterable: Iterable | None = None, *, progress: bool = True, **options) -> tqdm:
    """A tqdm bar with its `options`; shown when `progress` is true, written to the followed file in any case."""
    if stream := followed():
        return tqdm(iterable, file=stream, ncols=90, ascii=True, leave=False, **({"mininterval": 2} | options))
    return shown(iterable, disable=not progress, leave=False, **options)


def followed() -> TextIO | None:
    """The file that the runner follows, open for more lines; None where nobody does."""
    path = os.environ.get(FOLLOWED)
    return Path(path).open("a", buffering=1, encoding="utf-8") if path else None
