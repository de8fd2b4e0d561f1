"""What a measured row depends on, as a digest: a row whose digest is known need not be measured again.

The code of pruning counts, but of methods/ only the files that a method's own parts are written in, so that a new
method, or a change of one, costs that method alone.
"""

import functools
import hashlib
import inspect
import json
import uuid
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import numpy as np
import torch

from slimllm_nb.comparison.protocol import Protocol
from slimllm_nb.corpora import find_corpus
from slimllm_nb.methods import Method, Part
from slimllm_nb.reproduce.profiles import Profile
from slimllm_nb.reproduce.stamps import PACKAGE, code_digest, file_digest

CODE = ("calibration", "comparison.compare", "evaluation.perplexity", "pruning", "sources.models", "sources.texts")
METHODS = PACKAGE / "methods"
# What puts parts together, and what cannot change a number: names, files, bars, reports.
INDIFFERENT = {METHODS / name for name in ("__init__.py", "registry.py", "method.py")} | {
    PACKAGE / name for name in ("progress.py", "files.py", "settings.py", "sources/downloads.py", "sources/hub.py")
}
PACKAGES = ("torch", "transformers")


def digest(**what) -> str:
    """SHA-256 over anything that JSON can hold."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


@functools.cache
def of_code() -> str:
    """The package's code, whatever the method, and the versions of what it stands on."""

    def without(file: Path) -> bool:
        own = file.parent == PACKAGE / "comparison" and file.name != "compare.py"
        part = file.is_relative_to(METHODS) and file.name != "gradients.py"  # what asks for them does not import it
        return own or part or file in INDIFFERENT or file.is_relative_to(PACKAGE / "reproduce")

    return digest(code=code_digest(CODE, without), versions=[version(package) for package in PACKAGES])


def of_method(method: Method) -> list:
    """Every part: kind, name, options, and the source of its function."""
    return [
        [part.kind, part.name, repr(sorted(part.options.items())), part.adds_bias, _source(part)]
        for part in method.parts
    ]


def of_model(profile: Profile) -> list:
    """The model by its name, or by its files, and how it is loaded."""
    return [profile.model, profile.loading, of_files(Path(profile.model).glob("*"))]


def of_protocol(protocol: Protocol, profile: Profile) -> list:
    """All settings, and the files of texts of one's own."""
    own = [find_corpus(name, profile.texts) for name in (*protocol.calibrate_on, *protocol.judge_on)]
    files = [Path(file) for one in own if one is not None for file in one.files or ()]
    return [protocol.model_dump(), [one and one.model_dump() for one in own], of_files(files)]


def of_tensor(tensor: torch.Tensor) -> list:
    """Its type, its shape and its numbers."""
    data = tensor.detach().cpu().flatten()
    sha256 = hashlib.sha256(data.view(torch.uint8).numpy().tobytes()).hexdigest()
    return [str(data.dtype), list(tensor.shape), sha256]


def of_files(files) -> list:
    """Name, size and time of the last change: no gigabyte is hashed."""
    found = [(path.name, path.stat()) for path in sorted(files) if path.is_file()]
    return [[name, one.st_size, one.st_mtime_ns] for name, one in found]


def _of_file(file: Path) -> str:
    """A part's file, with what it imports from the package."""
    return file_digest(file, INDIFFERENT.__contains__)


_of_own_file = functools.cache(_of_file)  # as of_code: a process runs the package as it was when it was imported


def _source(part: Part) -> list:
    """The file it is written in with what that imports from the package, or, where there is none, as in a notebook, the
    values and functions that it names; and its compiled code with the values that it closes over. The package's own
    files say all, under every version of Python."""
    own = part.file is not None and part.file.is_relative_to(PACKAGE)
    file = [] if part.file is None else [(_of_own_file if own else _of_file)(part.file)]
    plain = isinstance(part.function, FunctionType) and not inspect.getclosurevars(part.function).nonlocals
    if own and plain:
        return file
    return file + _function(part.function, whole=not file, seen=set())


def _function(function: Callable, whole: bool, seen: set) -> list:
    if isinstance(function, functools.partial):
        inner = _function(function.func, whole, seen)
        return [*inner, [_value(one, whole, seen) for one in (*function.args, *sorted(function.keywords.items()))]]
    if not isinstance(function, FunctionType):  # an object that can be called: what is in it, nobody knows
        return [_never()]
    if function in seen:
        return [function.__qualname__]
    seen.add(function)
    outer = inspect.getclosurevars(function)
    names = dict(outer.nonlocals) | (dict(outer.globals) if whole else {})
    defaults = [function.__defaults__, sorted((function.__kwdefaults__ or {}).items())]
    found = [[name, _value(value, whole, seen)] for name, value in sorted(names.items())]
    return [_code(function.__code__), [_value(one, whole, seen) for one in defaults], found]


def _code(code: CodeType) -> list:
    """Compiled code without the place it stands at: a comment or an empty line changes nothing."""
    constants = [_code(one) if isinstance(one, CodeType) else _value(one, False, set()) for one in code.co_consts]
    return [code.co_code.hex(), constants, code.co_names, code.co_varnames, code.co_freevars]


def _value(value, whole: bool, seen: set):
    if isinstance(value, torch.Tensor):
        return of_tensor(value)
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return [str(value.dtype), value.shape, hashlib.sha256(np.ascontiguousarray(value)).hexdigest()]
    if isinstance(value, torch.nn.Module):
        return [repr(value), [[name, of_tensor(one)] for name, one in value.state_dict().items()]]
    if isinstance(value, functools.partial):
        return [_value(one, whole, seen) for one in (value.func, value.args, value.keywords)]
    if value is None or isinstance(value, str | int | float | complex | bytes):
        return repr(value)
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, list | tuple):
        return [_value(one, whole, seen) for one in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, dict):
        return [[repr(key), _value(one, whole, seen)] for key, one in value.items()]
    if callable(value) and hasattr(value, "__qualname__"):
        inside = getattr(value, "__module__", "__main__") != "__main__"
        return [value.__module__, value.__qualname__] if inside else _function(value, whole, seen)
    return _never()


def _never() -> str:
    """What cannot be recognised again: measured anew by every program that asks."""
    return uuid.uuid4().hex
