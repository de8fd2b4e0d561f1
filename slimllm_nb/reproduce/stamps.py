"""What a notebook depends on, and whether what it left behind is still up to date.

After a success the runner stamps a notebook with a digest of all that went into it; as long as the digest is the same
and every file it left is there, it need not run again. Nothing here imports what is slow to import.
"""

import ast
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import slimllm_nb
from slimllm_nb.files import ROOT, write_text
from slimllm_nb.reproduce.claims import load_claims
from slimllm_nb.reproduce.profiles import Profile, method_files
from slimllm_nb.reproduce.published import NOTEBOOK

PACKAGE = Path(slimllm_nb.__file__).parent
LOCK = ROOT / "requirements.lock"
DATA = ROOT / "data"
# What a module reads of data/: profiles and claims go into a digest by themselves.
READS = {
    "corpora.py": "corpora.yaml",
    "reproduce/claims.py": "paper/*.csv",
    "evaluation/zeroshot.py": "tasks/*.[py]*",
    "reproduce/differences.py": "ablations/*.json",
    "reproduce/kept.py": "zeroshot/*.json",
}
PARAMETERS = "parameters"


class NotebookError(ValueError):
    """A notebook that cannot be run: not a notebook, not Python, or without a proper parameters cell."""


def read_cells(path: Path) -> list[dict]:
    """The cells of a notebook file, each with its source as one string."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [cell | {"source": "".join(cell["source"])} for cell in cells]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotebookError(f"{path} is not a notebook: {error!r}") from error


def read_parameters(path: Path) -> dict[str, object]:
    """name -> default of the one cell tagged "parameters", which holds nothing but `name = literal`."""
    tagged = [cell for cell in read_cells(path) if PARAMETERS in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise NotebookError(f"{path} has {len(tagged)} cells tagged {PARAMETERS!r}; it must have one")
    try:
        assignments = [(one.targets[0].id, ast.literal_eval(one.value)) for one in ast.parse(tagged[0]["source"]).body]
    except (SyntaxError, AttributeError, ValueError) as error:
        raise NotebookError(f"{path}: its parameters cell may hold only lines of the form name = literal") from error
    return dict(assignments)


def digest(path: Path, profile: Profile, parameters: dict[str, object]) -> str:
    """SHA-256 over all that a notebook depends on: its code and text, the package's modules that it imports (and those
    that they import), the files of data/ that these read, the profile, its parameters, its claims, the locked versions.
    """
    cells = read_cells(path)
    total = hashlib.sha256()
    claims = [claim.model_dump(mode="json") for claim in load_claims(path.stem, profile)]
    values = [[cell["cell_type"], cell["metadata"].get("tags", []), cell["source"]] for cell in cells]
    total.update(json.dumps([values, profile.model_dump(mode="json"), parameters, claims], sort_keys=True).encode())
    _add_files(total, {LOCK, *_used_by_cells(path, cells), *method_files(profile)})
    return total.hexdigest()


def dense_digest(profile: Profile) -> str:
    """SHA-256 over all that the measurement of the dense model depends on (dense.py)."""
    total = hashlib.sha256(profile.model_dump_json(exclude={"settings", "description"}).encode())
    claims = [claim.model_dump(mode="json") for claim in load_claims(NOTEBOOK, profile) if "-dense-" in claim.id]
    total.update(json.dumps(claims, sort_keys=True).encode())
    _add_files(total, {LOCK, *_used(["reproduce.dense"])})
    return total.hexdigest()


def code_digest(modules: Iterable[str], without: Callable[[Path], bool] = lambda file: False) -> str:
    """SHA-256 over these modules ("a.b": slimllm_nb.a.b), all that they import from the package, and what they read.

    without: which files do not count, nor what they alone import.
    """
    total = hashlib.sha256()
    _add_files(total, _used(modules, without))
    return total.hexdigest()


def file_digest(file: Path, without: Callable[[Path], bool] = lambda file: False) -> str:
    """The same for a Python file, wherever it lies."""
    total = hashlib.sha256()
    _add_files(total, {file, *_used(_imports(ast.parse(file.read_text(encoding="utf-8"))), without)})
    return total.hexdigest()


def _add_files(total, files: set[Path]) -> None:
    for file in sorted(files):
        content = file.read_bytes()
        total.update(f"{file.name} {len(content)}\n".encode() + content)


def _used_by_cells(path: Path, cells: list[dict]) -> set[Path]:
    """The package's files that a notebook's cells import, all that those import in turn, and what they read."""
    imported = []
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            try:
                imported += _imports(_parse(cell["source"]))
            except SyntaxError as error:
                raise NotebookError(f"{path}: cell {number} is not valid Python: {error}") from error
    return _used(imported)


def _used(modules: Iterable[str], without: Callable[[Path], bool] = lambda file: False) -> set[Path]:
    """The files of these modules ("a.b": slimllm_nb.a.b), of all that they import, and what they read."""
    found: set[Path] = set()
    waiting = [file for module in modules for file in _files(module)]
    while waiting:
        file = waiting.pop()
        if file in found or without(file):
            continue
        found.add(file)
        if file.suffix == ".py":
            imported = _imports_of(file.read_text(encoding="utf-8"))
            waiting += [other for module in imported for other in _files(module)]
        if file.is_relative_to(PACKAGE) and (pattern := READS.get(file.relative_to(PACKAGE).as_posix())):
            waiting += filter(Path.is_file, DATA.glob(pattern))
    return found


@functools.cache
def _imports_of(text: str) -> list[str]:
    return list(_imports(ast.parse(text)))


def _files(module: str) -> Iterator[Path]:
    """The files that importing "a.b.c" runs: of each package on the way its __init__.py, and the module itself."""
    folder = PACKAGE
    yield folder / "__init__.py"
    for part in filter(None, module.split(".")):
        if (folder / f"{part}.py").is_file():
            yield folder / f"{part}.py"
            return
        folder /= part
        if not (folder / "__init__.py").is_file():
            return
        yield folder / "__init__.py"


def _parse(source: str) -> ast.Module:
    """A cell as Python; where that fails, without its magics and shell commands."""
    try:
        return ast.parse(source)
    except SyntaxError:
        lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
        return ast.parse("\n".join(lines))


def _imports(tree: ast.AST) -> Iterator[str]:
    """What stands after `slimllm_nb.` in import statements anywhere; the last part may be a function, not a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (
            name.removeprefix("slimllm_nb").lstrip(".") for name in names if f"{name}.".startswith("slimllm_nb.")
        )


def stamp_file(folder: Path, notebook: str) -> Path:
    return folder / "stamps" / f"{notebook}.json"


def read_stamp(folder: Path, notebook: str) -> dict | None:
    """The stamp of a notebook that ran to its end, or None."""
    try:
        return json.loads(stamp_file(folder, notebook).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def write_stamp(folder: Path, notebook: str, value: str, start_ns: int, seconds: float) -> None:
    """Stamp a notebook, with size and time of every file in the run folder that was written since it started.

    Not the stamps: the one before may be as young as the start, by a file system's clock of some milliseconds.
    """
    stamps = stamp_file(folder, notebook).parent
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_mtime_ns >= start_ns]
    outputs = {path.relative_to(folder).as_posix(): _state(path) for path in sorted(files) if path.parent != stamps}
    content = {"digest": value, "seconds": seconds, "outputs": outputs}
    write_text(stamp_file(folder, notebook), json.dumps(content, indent=1))


def up_to_date(folder: Path, notebook: str, value: str) -> bool:
    """Whether the notebook ran with the same digest and nothing that it wrote is gone or was changed since."""
    stamp = read_stamp(folder, notebook)
    if stamp is None or stamp["digest"] != value:
        return False
    return all((path := folder / name).is_file() and _state(path) == state for name, state in stamp["outputs"].items())


def _state(path: Path) -> list[int]:
    """Size and time of the last change: an edit that keeps the size shows too, and no gigabyte is hashed."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]
