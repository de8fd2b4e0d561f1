"""What a notebook depends on, and whether what it left behind is still up to date.

After a success the runner stamps a notebook with the fingerprint of all that went into it; as long as that is the same
and every file it left is there, it need not run again. Nothing here imports what is slow to import.
"""

import ast
import json
from pathlib import Path

from slimllm_nb.files import ROOT, write_text
from slimllm_nb.fingerprint import fingerprint
from slimllm_nb.reproduce.claims import load_claims
from slimllm_nb.reproduce.profiles import Profile, text_files
from slimllm_nb.reproduce.published import NOTEBOOK

LOCK = ROOT / "requirements.lock"
DATA, READ = ROOT / "data", (".yaml", ".csv", ".json", ".py")
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
    """The fingerprint of all that a notebook depends on: its code and text, the package, data/, the profile with the
    content of its own texts and parts, its parameters, its claims, the locked versions."""
    cells = read_cells(path)
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            _require_python(cell["source"], f"{path}: cell {number}")
    values = [[cell["cell_type"], cell["metadata"].get("tags", []), cell["source"]] for cell in cells]
    claims = [claim.model_dump(mode="json") for claim in load_claims(path.stem, profile)]
    return fingerprint(cells=values, parameters=parameters, claims=claims, others=_others(profile), profile=profile)


def _require_python(source: str, where: str) -> None:
    """Raises: NotebookError for a cell that is not Python, nor with its magics and shell commands left out."""
    try:
        ast.parse(source)
    except SyntaxError as error:
        lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
        try:
            ast.parse("\n".join(lines))
        except SyntaxError:
            raise NotebookError(f"{where} is not valid Python: {error}") from error


def dense_digest(profile: Profile) -> str:
    """The fingerprint of all that the measurement of the dense model depends on (dense.py)."""
    claims = [claim.model_dump(mode="json") for claim in load_claims(NOTEBOOK, profile) if "-dense-" in claim.id]
    measured = profile.model_dump(mode="json", exclude={"settings", "description", "method", "parts"})
    return fingerprint(profile=measured, claims=claims, others=[LOCK, text_files(profile)])


def _others(profile: Profile) -> list:
    read = sorted(path for path in DATA.rglob("*") if path.suffix in READ and path.parent.name != "gpu")
    return [LOCK, read, text_files(profile), [Path(file) for file in profile.parts]]


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
