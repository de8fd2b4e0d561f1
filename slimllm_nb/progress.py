"""Progress bars of what takes long: in the notebook, or on the screen of the run that the notebook is a part of."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from tqdm import tqdm
from tqdm.auto import tqdm as shown

FOLLOWED = "SLIMLLM_NB_PROGRESS"  # a path to write bars to; a notebook's own outputs stay without them


def bar(iterable: Iterable | None = None, *, progress: bool = True, **options) -> tqdm:
    """A tqdm bar with its `options`; shown when `progress` is true, written to that path in any case."""
    if stream := followed():
        return tqdm(iterable, file=stream, ncols=90, ascii=True, leave=False, **({"mininterval": 2} | options))
    return shown(iterable, disable=not progress, leave=False, **options)


def followed() -> TextIO | None:
    """What the environment names, open for more; None where it names nothing."""
    path = os.environ.get(FOLLOWED)
    return Path(path).open("a", buffering=1, encoding="utf-8") if path else None
