"""Where the repository lies, and files that appear whole or not at all."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

ROOT = Path(__file__).resolve().parent.parent
CACHE_VARIABLE = "SLIMLLM_NB_CACHE"


def expanded(path: str | Path) -> Path:
    """With ~ as a shell reads it; what names no user stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  Path's own raises RuntimeError there


def cache_folder() -> Path:
    """Where converted models and cleaned texts are kept: $SLIMLLM_NB_CACHE, or the user's cache folder of this
    system."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else Path(platformdirs.user_cache_dir("slimllm-nb"))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; at the end it takes the place of `path`, after an error it is gone.

    A reader sees the old file or the new one, never half of one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def existing(path: Path) -> Path:
    """The folder, or the first one above it that exists."""
    return next(one for one in (path, *path.absolute().parents) if one.exists())


def require_room(folder: Path, size: int) -> None:
    """Raises: ValueError unless the disk has room for so many bytes, those counted that are in the folder already."""
    there, place = sum(path.stat().st_size for path in folder.glob("*")), existing(folder)
    if (free := shutil.disk_usage(place).free) + there < size:
        raise ValueError(
            f"{place} has {free / 1e9:.1f} GB free; the finished layers and the checkpoint made of them may take "
            f"{(size - there) / 1e9:.1f} GB: give a target on another disk"
        )


def begun(folder: Path, key: str) -> Path:
    """A folder of work to go on with: emptied where it was begun with another key (all that decides the result)."""
    path = folder / "key.txt"
    if folder.is_dir() and not (path.is_file() and path.read_text(encoding="utf-8") == key):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, key)
    return folder


def commit() -> str | None:
    """The commit that the repository is at; None where there is none, or no git."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False) if shutil.which("git") else None
    return done.stdout.strip() if done and done.returncode == 0 else None
