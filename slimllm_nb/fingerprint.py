"""One fingerprint for what is cached under runs/: what made it, the package's code, and the versions it stands on.

Coarse on purpose: any edit of the package makes everything new, and what depends on what need not be known. What
cannot be recognised again (an object whose inside is unknown) gets a fingerprint that no other program will find.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import sys
import uuid
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import FunctionType, ModuleType

from pydantic import BaseModel

import slimllm_nb

PACKAGE = Path(slimllm_nb.__file__).parent
PACKAGES = ("torch", "transformers")
WEIGHTS = (".safetensors", ".bin", ".gguf")  # known by size and time: no gigabyte is hashed


def fingerprint(**inputs) -> str:
    """SHA-256 over the inputs (digest), all of slimllm_nb/**.py, and the versions of torch and transformers."""
    return digest(code=_code(), versions=[version(package) for package in PACKAGES], **inputs)


def digest(**inputs) -> str:
    """SHA-256 over the inputs alone: numbers, strings, tensors, files and folders (by content), functions (by source,
    closure and the globals that they name), settings, and lists and mappings of them."""
    return _sha256(json.dumps(_described(inputs, set()), sort_keys=True).encode())


@functools.cache  # a process runs the package as it was when it was imported
def _code() -> list:
    return [
        [path.relative_to(PACKAGE).as_posix(), _sha256(path.read_bytes())] for path in sorted(PACKAGE.rglob("*.py"))
    ]


def _sha256(data) -> str:
    return hashlib.sha256(data).hexdigest()


def _described(value, seen: set):
    """As JSON. seen: the functions on the way."""
    if value is None or isinstance(value, str | bool | int | float | complex | bytes):
        return value if value is None or isinstance(value, str | bool) else repr(value)
    if isinstance(value, Path):
        return _file(value)
    if (array := _array(value)) is not None:
        return array
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
        return [type(value).__name__, _described(fields, seen)]
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, functools.partial):
        return _described([value.func, value.args, value.keywords], seen)
    if isinstance(value, Mapping):
        return [
            [repr(key), _described(one, seen)] for key, one in sorted(value.items(), key=lambda pair: repr(pair[0]))
        ]
    if isinstance(value, list | tuple):
        return [_described(one, seen) for one in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if callable(value):
        return _function(value, seen)
    return uuid.uuid4().hex


def _array(value) -> list | None:
    """A tensor, an array or a module; none of them is there where its package was not imported."""
    torch, np = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch and isinstance(value, torch.Tensor):
        data = value.detach().cpu().flatten()
        return [str(data.dtype), list(value.shape), _sha256(data.view(torch.uint8).numpy().tobytes())]
    if torch and isinstance(value, torch.nn.Module):
        return [repr(value), _described(value.state_dict(), set())]
    if torch and isinstance(value, torch.dtype):
        return [str(value)]
    if np and isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return [str(value.dtype), list(value.shape), _sha256(np.ascontiguousarray(value))]
    return None


def _file(path: Path) -> list:
    if path.is_dir():
        return [_file(one) for one in sorted(path.glob("*")) if one.is_file()]
    known = path.stat()
    if path.suffix in WEIGHTS:
        return [path.name, known.st_size, known.st_mtime_ns]
    return [path.name, _sha256(path.read_bytes())]


def _function(function: Callable, seen: set):
    """The package's own by their names, and their closures; others by their source too, and by what they name."""
    if inspect.ismethod(function):
        return _described([function.__func__, function.__self__], seen)
    if not isinstance(function, FunctionType):
        known = hasattr(function, "__qualname__") and getattr(function, "__module__", None) != "__main__"
        return [function.__module__, function.__qualname__] if known else uuid.uuid4().hex
    if function in seen:
        return function.__qualname__
    seen.add(function)
    outer, own = inspect.getclosurevars(function), (function.__module__ or "").startswith("slimllm_nb.")
    names = dict(outer.nonlocals) | ({} if own else dict(outer.globals))
    try:
        code = function.__code__  # two lambdas may share a line
        constants = [one for one in code.co_consts if not inspect.iscode(one)]
        source = None if own else [inspect.getsource(function), code.co_code.hex(), repr(constants)]
    except (OSError, TypeError):  # a function that was made without a file or a cell
        source = uuid.uuid4().hex
    defaults = [function.__defaults__, function.__kwdefaults__]
    return [function.__module__, function.__qualname__, source, _described([defaults, names], seen)]
