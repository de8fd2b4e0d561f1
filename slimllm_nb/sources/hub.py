"""The Hugging Face hub: a local folder in its place, and its errors in words that say what to do.

$SLIMLLM_NB_HUB may name a folder laid out like the hub (models/<owner>/<name>, datasets/<owner>/<name>; default: hub in
our cache): what lies there is taken from there, which serves a machine without internet, and models whose weights were
converted (convert.py). The rest comes from the hub and its own cache.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import chdir, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from slimllm_nb.files import cache_folder, expanded
from slimllm_nb.sources.packages import SourceError

if TYPE_CHECKING:
    from datasets import Dataset

HUB_VARIABLE = "SLIMLLM_NB_HUB"
NETWORK_ERRORS = {"ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError", "RemoteProtocolError", "ReadError"}


def hub_folder() -> Path:
    """The folder laid out like the hub; it need not be there."""
    return expanded(os.environ.get(HUB_VARIABLE) or cache_folder() / "hub").absolute()


def local_copy(kind: str, name: str) -> str:
    """`name` where it is a folder or only the hub has it, else the folder of hub_folder() that holds this hub id.

    kind: "models" or "datasets".
    """
    name = str(expanded(name))
    path = hub_folder() / kind / name
    return str(path) if not Path(name).is_dir() and path.is_dir() else name


@contextmanager
def in_local_datasets() -> Iterator[None]:
    """Inside it, `datasets` finds the hub ids that lie in hub_folder(): it takes a folder of that name.

    For libraries that call load_dataset themselves (lm-eval).
    """
    folder = hub_folder() / "datasets"
    with chdir(folder) if folder.is_dir() else nullcontext():
        yield


def load_rows(name: str, split: str, config: str | None = None, revision: str | None = None, **options) -> "Dataset":
    """A split of a data set of the hub, or of a folder laid out like one. options: as `datasets.load_dataset` has them.
    Raises: SourceError, as hub_error words it."""
    import datasets

    path = local_copy("datasets", name)
    if not Path(path).is_dir():
        options["revision"] = revision
    try:
        return datasets.load_dataset(path, config, split=split, **options)
    except Exception as error:  # no network shows itself as one of many kinds
        raise hub_error("data set", name, revision, error) from error


def hub_error(what: str, name: str, revision: str | None, error: BaseException) -> SourceError:
    """A SourceError that says what was asked for, what the hub answered and what to do."""
    causes = list(_chain(error))
    page = f"https://huggingface.co/{'datasets/' if what != 'model' else ''}{name}"

    def met(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in causes)

    if met(GatedRepoError):
        remedy = (
            f"it is gated: accept its licence at {page}, then log in with `hf auth login` or set HF_TOKEN to a token "
            "of that account (https://huggingface.co/settings/tokens)"
        )
    elif met(RevisionNotFoundError):
        remedy = f"it has no revision {revision!r}: give a commit, tag or branch that {page} lists, or leave it out"
    elif any(isinstance(one, OSError) and one.errno == errno.ENOSPC for one in causes) or _says(
        causes, "No space left"
    ):
        remedy = "the disk is full: free some space, or set HF_HOME to a folder on another disk"
    elif met(LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, TimeoutError) or any(
        type(one).__name__ in NETWORK_ERRORS for one in causes
    ):
        remedy = (
            "the hub cannot be reached: check the network (and HF_HUB_OFFLINE), or set "
            f"{HUB_VARIABLE} to a folder that holds it"
        )
    elif met(RepositoryNotFoundError):
        remedy = f"there is none, or it is private and no token is set: look at {page}, set HF_TOKEN"
    elif met(EntryNotFoundError):
        remedy = f"a file of it is missing: look at {page}"
    else:
        remedy = "look at what the library said"
    return SourceError(f"cannot load the {what} {name!r}: {remedy}. ({type(error).__name__}: {_first_line(error)})")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _says(causes: list[BaseException], text: str) -> bool:
    return any(text in str(one) for one in causes)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else ""
