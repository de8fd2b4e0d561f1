"""What comes before the notebooks: python -m slimllm_nb.reproduce.start --profile NAME

Settings are read, and refused; what the run needs is said and checked; a model of the hub or of one's own is measured
as it is (dense.py). Then runs/<profile>/inputs is there, written anew only where what the notebooks depend on has
changed: make runs those that are older than it. Where memory is too small for the notebooks, or with --by-layer, the
profile is pruned and measured one decoder layer at a time (by_layer.py) and there is no such file. Exit status: 0; 1
when the dense model is not the published one, or an expected claim does not hold; 2 for settings that are refused.
"""

import argparse
import ast
import json
import os
import re
import sys
from pathlib import Path

import yaml

from slimllm_nb.command import command
from slimllm_nb.files import ROOT, write_text
from slimllm_nb.fingerprint import fingerprint
from slimllm_nb.reproduce import dense
from slimllm_nb.reproduce.cost import TooLargeError, announce
from slimllm_nb.reproduce.profiles import Profile, is_path, load_profile, own_files, run_folder

LOCK, DATA, READ = ROOT / "requirements.lock", ROOT / "data", (".yaml", ".csv", ".json", ".py")
INPUTS, PARAMETERS = "inputs", "parameters"
SET_BY_RUNNER = {"profile": "PROFILE", "output_folder": "the environment variable SLIMLLM_NB_RUNS"}


class SettingError(ValueError):
    """A setting on the command line that is refused before anything starts."""


class NotebookError(ValueError):
    """A notebook that cannot be run: not a notebook, or without a proper parameters cell."""


@command
def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = _parse(arguments)
    # The notebooks run in another folder than the command.
    chosen = str(Path(options.profile).absolute()) if is_path(options.profile) else options.profile
    profile = load_profile(chosen)
    notebooks = sorted(options.notebooks.glob("*.ipynb"))
    parameters = {"profile": chosen} | check_parameters(notebooks, options.parameters)
    folder = run_folder(profile.name)
    if re.search(r"[\s:#%$]", str(folder.parent)):
        raise SettingError(f"SLIMLLM_NB_RUNS is {folder.parent}; make can work in no folder with a space or :#%$ in it")
    inputs = folder / INPUTS
    if options.by_layer:
        return _by_layer(profile, inputs)
    content = json.dumps({"made_from": made_from(profile, parameters), "parameters": parameters}, indent=1) + "\n"
    changed = not inputs.is_file() or inputs.read_text(encoding="utf-8") != content
    _tidy(folder)
    if changed or not all(_newer(folder / one.name, inputs, one) for one in notebooks):
        try:
            print(announce(profile, folder), file=sys.stderr, flush=True)
        except TooLargeError as error:
            print(f"{error}. Without the notebooks, one decoder layer at a time:", file=sys.stderr, flush=True)
            return _by_layer(profile, inputs)
    if changed:
        write_text(inputs, content)
    if profile.model == "embedded":
        return 0
    if not _newer(folder / dense.FILE, inputs):
        dense.measure(profile)
    return dense.gate(profile)


def _by_layer(profile: Profile, inputs: Path) -> int:
    """Prune and measure without notebooks; 1 when an expected claim does not hold."""
    from slimllm_nb.reproduce import by_layer

    inputs.unlink(missing_ok=True)
    return 1 if any(one.fails_run for one in by_layer.run(profile, inputs.parent)) else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m slimllm_nb.reproduce.start", description=__doc__.splitlines()[0])
    named = "a file of data/profiles (default: embedded), or the path of a .yaml file of your own"
    parser.add_argument("--profile", default="embedded", help=named)
    given = {"dest": "parameters", "action": "append", "default": [], "metavar": "NAME=VALUE"}
    parser.add_argument("-p", **given, help="set a parameter of the notebooks that have it")
    layers = "no notebooks: prune and measure with one decoder layer in memory"
    parser.add_argument("--by-layer", action="store_true", help=layers)
    parser.add_argument("--notebooks", type=Path, default=ROOT / "notebooks", metavar="FOLDER", help="what to run")
    return parser.parse_args(arguments)


def _tidy(folder: Path) -> None:
    """What an end by force left is removed; an executed notebook whose result is gone counts as old."""
    for partial in folder.glob(".*.partial*"):
        partial.unlink()
    for executed in folder.glob("*.ipynb"):
        if not (folder / "results" / f"{executed.stem}.json").is_file():
            os.utime(executed, (0, 0))


def _newer(path: Path, *than: Path) -> bool:
    """As make sees it."""
    return path.is_file() and all(path.stat().st_mtime_ns >= one.stat().st_mtime_ns for one in than)


def made_from(profile: Profile, parameters: dict[str, object]) -> str:
    """The fingerprint of all that the notebooks depend on beside their own files: the package, data/, the locked
    versions, the profile with its own texts, parts, table and model, the parameters."""
    read = sorted(path for path in DATA.rglob("*") if path.suffix in READ and path.parent.name != "gpu")
    return fingerprint(files=[LOCK, *read, *own_files(profile)], profile=profile, parameters=parameters)


def read_parameters(path: Path) -> dict[str, object]:
    """name -> default of a notebook's one cell tagged "parameters", which holds nothing but `name = literal`.

    Read by hand: papermill takes seconds to import, and only warns of an unknown parameter.
    """
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        tagged = ["".join(one["source"]) for one in cells if PARAMETERS in one["metadata"].get("tags", [])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotebookError(f"{path} is not a notebook: {error!r}") from error
    if len(tagged) != 1:
        raise NotebookError(f"{path} has {len(tagged)} cells tagged {PARAMETERS!r}; it must have one")
    try:
        found = {one.targets[0].id: ast.literal_eval(one.value) for one in ast.parse(tagged[0]).body}
    except (SyntaxError, AttributeError, ValueError) as error:
        raise NotebookError(f"{path}: its parameters cell may hold only lines of the form name = literal") from error
    if "profile" not in found:
        raise NotebookError(f"{path}: its parameters cell has no profile")
    return found


def check_parameters(notebooks: list[Path], given: list[str]) -> dict[str, object]:
    """What was given as name=value, each of which a notebook knows."""
    known = [read_parameters(path) for path in notebooks]
    values: dict[str, object] = {}
    for text in given:
        parameter, equals, value = text.partition("=")
        if not equals:
            raise SettingError(f"-p {text}: give it as name=value")
        if parameter in SET_BY_RUNNER:
            raise SettingError(f"-p {text}: {parameter} is set by {SET_BY_RUNNER[parameter]}")
        allowed = {key for cell in known for key in cell} - set(SET_BY_RUNNER)
        if parameter not in allowed:
            listed = ", ".join(sorted(allowed)) or "none"
            raise SettingError(f"-p {text}: no notebook has a parameter {parameter!r}; allowed: {listed}")
        values[parameter] = _typed(text, value, [cell[parameter] for cell in known if parameter in cell])
    return values


def _typed(text: str, value: str, defaults: list) -> object:
    """The value as YAML, refused where it is of another kind than a notebook's default."""
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SettingError(f"-p {text}: the value is not valid YAML") from error
    for default in defaults:
        whole_for_real = type(default) is float and type(parsed) is int
        if default is not None and type(parsed) is not type(default) and not whole_for_real:
            wanted, found = type(default).__name__, type(parsed).__name__
            raise SettingError(f"-p {text}: the value must be {wanted}, like the default {default!r}; it is {found}")
    return parsed


if __name__ == "__main__":
    sys.exit(main())
