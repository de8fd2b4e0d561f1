"""What a notebook depends on, and whether what it left behind is still up to date.

After a success the runner stamps a notebook with a digest of all that went into it; as long as the digest is the same
and every file it left is there, it need not run again. Nothing here imports what is slow to import.
"""

import ast
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import slimllm_nb
from slimllm_nb import paper
from slimllm_nb.profiles import PROFILES, ROOT, Profile

PACKAGE = Path(slimllm_nb.__file__).parent
LOCK = ROOT / "requirements.lock"
DATA = ROOT / "data"
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
    that they import), the profile, its parameters, its claims, the rest of data/ and the locked versions."""
    cells = read_cells(path)
    total = hashlib.sha256()
    claims = [claim.model_dump(mode="json") for claim in paper.load_claims(path.stem, profile.name)]
    values = [[cell["cell_type"], cell["metadata"].get("tags", []), cell["source"]] for cell in cells]
    total.update(json.dumps([values, profile.model_dump(mode="json"), parameters, claims], sort_keys=True).encode())
    for file in sorted({LOCK, *_data_files(), *_modules(path, cells)}):
        content = file.read_bytes()
        total.update(f"{file.name} {len(content)}\n".encode() + content)
    return total.hexdigest()


def _data_files() -> list[Path]:
    """data/ without profiles and claims, of which only what concerns the notebook goes in, and without prose."""
    files = [path for path in DATA.rglob("*") if path.is_file() and path.suffix not in {".md", ".pyc"}]
    return [path for path in files if path.parent != PROFILES and path != paper.CLAIMS]


def _modules(path: Path, cells: list[dict]) -> set[Path]:
    """The package's files that a notebook's cells import, and all that those import in turn."""
    found: set[Path] = set()
    waiting = []
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            try:
                waiting += _imports(_parse(cell["source"]))
            except SyntaxError as error:
                raise NotebookError(f"{path}: cell {number} is not valid Python: {error}") from error
    while waiting:
        module = PACKAGE / f"{waiting.pop()}.py"
        if module.is_file() and module not in found:
            found.add(module)
            waiting += _imports(ast.parse(module.read_text(encoding="utf-8")))
    return found


def _parse(source: str) -> ast.Module:
    """A cell as Python; where that fails, without its magics and shell commands."""
    try:
        return ast.parse(source)
    except SyntaxError:
        lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
        return ast.parse("\n".join(lines))


def _imports(tree: ast.AST) -> Iterator[str]:
    """Names after `slimllm_nb.` in import statements anywhere; some may be functions rather than modules."""
    yield "__init__"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["slimllm_nb" if node.level else "", node.module]))
            names = [f"{base}.{alias.name}" for alias in node.names] + [base]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("slimllm_nb."))


def stamp_file(folder: Path, notebook: str) -> Path:
    return folder / "stamps" / f"{notebook}.json"


def read_stamp(folder: Path, notebook: str) -> dict | None:
    """The stamp of a notebook that ran to its end, or None."""
    try:
        return json.loads(stamp_file(folder, notebook).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def write_stamp(folder: Path, notebook: str, value: str, start_ns: int, seconds: float) -> None:
    """Stamp a notebook, with the size of every file in the run folder that was written since it started.

    Not the stamps: the one before may be as young as the start, by a file system's clock of some milliseconds.
    """
    stamps = stamp_file(folder, notebook).parent
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_mtime_ns >= start_ns]
    files = [path for path in files if path.parent != stamps]
    outputs = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}
    content = {"digest": value, "seconds": seconds, "outputs": outputs}
    paper.write_text(stamp_file(folder, notebook), json.dumps(content, indent=1))


def up_to_date(folder: Path, notebook: str, value: str) -> bool:
    """Whether the notebook ran with the same digest and all it wrote is still there in full size."""
    stamp = read_stamp(folder, notebook)
    if stamp is None or stamp["digest"] != value:
        return False
    paths = [(folder / name, size) for name, size in stamp["outputs"].items()]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)
