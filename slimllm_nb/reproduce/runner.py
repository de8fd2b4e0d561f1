"""Run the notebooks in order, judge the paper's claims, write the report: python -m slimllm_nb.reproduce --profile NAME

A model of the hub or of one's own is first measured as it is (dense.py). Each notebook runs in a fresh kernel and
leaves runs/<profile>/<notebook>.ipynb and results/<notebook>.json. What is up to date is not run again, so an
interrupted run goes on where it stopped. Where memory is too small for the notebooks, or with --by-layer, the profile
is pruned and measured one decoder layer at a time (by_layer.py). Exit status: 0 when all ran and every claim that is
expected to hold does; 1 when not; 2 for settings that are refused; 130 when interrupted.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

from slimllm_nb.command import command
from slimllm_nb.files import ROOT, write_text
from slimllm_nb.reproduce import pages, stamps, verdicts
from slimllm_nb.reproduce.cost import TooLargeError, announce
from slimllm_nb.reproduce.dense import ALLOW, explain
from slimllm_nb.reproduce.follow import followed
from slimllm_nb.reproduce.profiles import Profile, is_path, load_profile, run_folder

SET_BY_RUNNER = {"profile": "--profile", "output_folder": "the environment variable SLIMLLM_NB_RUNS"}


class SettingError(ValueError):
    """A setting on the command line that is refused before anything starts."""


class RunError(RuntimeError):
    """A notebook that failed, or did not leave the result it should."""


@command
def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = _parse(arguments)
    # The notebooks run in another folder than the command.
    chosen = str(Path(options.profile).absolute()) if is_path(options.profile) else options.profile
    profile = load_profile(chosen)
    notebooks = _find_notebooks(options.notebooks)
    parameters = _check_parameters(notebooks, options.parameters, chosen)
    # Also reads every notebook, module and claim: what is wrong with them is said now.
    digests = {name: stamps.digest(path, profile, parameters[name]) for name, path in notebooks.items()}
    folder = run_folder(profile.name)
    try:
        if options.by_layer:
            return _by_layer(profile, folder)
        if not all(stamps.up_to_date(folder, name, digest) for name, digest in digests.items()):
            try:
                print(announce(profile, folder), file=sys.stderr, flush=True)
            except TooLargeError as error:
                print(f"{error}. Without the notebooks, one decoder layer at a time:", file=sys.stderr, flush=True)
                return _by_layer(profile, folder)
        if profile.model != "embedded":
            _measure_dense(profile, chosen, folder)
        for number, (name, path) in enumerate(notebooks.items(), start=1):
            line = f"[{number}/{len(notebooks)}] {name}"
            if stamps.up_to_date(folder, name, digests[name]):
                print(f"{line}: up to date")
                continue
            print(f"{line} ...", flush=True)
            seconds = _run(path, folder, profile.name, parameters[name], digests[name])
            print(f"{line}: {seconds:.1f} s", flush=True)
        return _conclude(list(notebooks), folder, profile)
    except RunError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on with the notebook that was running.", file=sys.stderr)
        return 130


def _by_layer(profile: Profile, folder: Path) -> int:
    """Prune and measure without notebooks; 1 when an expected claim does not hold."""
    from slimllm_nb.reproduce import by_layer

    try:
        judged = by_layer.run(profile, folder)
    except (ValueError, OSError) as error:
        raise RunError(str(error)) from error
    return 1 if any(one.fails_run for one in judged) else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m slimllm_nb.reproduce", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--profile",
        default="embedded",
        help="a file of data/profiles (default: embedded), or the path of a .yaml file of your own",
    )
    parser.add_argument(
        "-p",
        dest="parameters",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a parameter of the notebooks that have it",
    )
    parser.add_argument(
        "--by-layer", action="store_true", help="no notebooks: prune and measure with one decoder layer in memory"
    )
    parser.add_argument("--notebooks", type=Path, default=ROOT / "notebooks", metavar="FOLDER", help="what to run")
    return parser.parse_args(arguments)


def _find_notebooks(folder: Path) -> dict[str, Path]:
    paths = {path.stem: path.resolve() for path in sorted(folder.glob("*.ipynb"))}
    if not paths:
        raise SettingError(f"{folder} has no notebooks (*.ipynb)")
    return paths


def _check_parameters(notebooks: dict[str, Path], given: list[str], profile_argument: str) -> dict[str, dict]:
    """What each notebook is started with: the profile, and of what was given what its parameters cell knows.

    The cells are read by hand: papermill takes seconds to import and only warns of an unknown parameter.
    """
    known = {name: stamps.read_parameters(path) for name, path in notebooks.items()}
    for name in known:
        if "profile" not in known[name]:
            raise SettingError(f"{notebooks[name]}: its parameters cell has no profile")
    values: dict[str, object] = {"profile": profile_argument}
    for text in given:
        parameter, equals, value = text.partition("=")
        if not equals:
            raise SettingError(f"-p {text}: give it as name=value")
        if parameter in SET_BY_RUNNER:
            raise SettingError(f"-p {text}: {parameter} is set by {SET_BY_RUNNER[parameter]}")
        allowed = {key for cell in known.values() for key in cell} - set(SET_BY_RUNNER)
        if parameter not in allowed:
            listed = ", ".join(sorted(allowed)) or "none"
            raise SettingError(f"-p {text}: no notebook has a parameter {parameter!r}; allowed: {listed}")
        values[parameter] = _typed(text, value, [cell[parameter] for cell in known.values() if parameter in cell])
    return {name: {key: value for key, value in values.items() if key in cell} for name, cell in known.items()}


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


def _measure_dense(profile: Profile, chosen: str, folder: Path) -> None:
    """The dense gate: fetch and measure the dense model in a process of its own, and stop when it is not the published
    one, unless ALLOW_DENSE_MISMATCH=1 says to go on with every verdict marked."""
    path, value = folder / "dense.json", stamps.dense_digest(profile)
    if not stamps.up_to_date(folder, "dense", value):
        print("[0] dense model ...", flush=True)
        for stale in (stamps.stamp_file(folder, "dense"), path):
            stale.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        start, start_ns = time.perf_counter(), time.time_ns()
        command = [sys.executable, "-m", "slimllm_nb.reproduce.dense", "--profile", chosen]
        done = _interruptible(subprocess.run, command)
        if done.returncode or not path.is_file():
            raise RunError(f"the dense model could not be measured (exit status {done.returncode}); nothing was pruned")
        seconds = time.perf_counter() - start
        stamps.write_stamp(folder, "dense", value, min(start_ns, path.stat().st_mtime_ns), seconds)
        print(f"[0] dense model: {seconds:.1f} s", flush=True)
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["off"]:
        print(explain(content, profile), file=sys.stderr, flush=True)
        if os.environ.get(ALLOW) != "1":
            raise RunError(
                f"nothing was pruned: mend the profile, or set {ALLOW}=1 to go on all the same (every verdict is then "
                f"marked). All of it is in {path}"
            )


def _run(path: Path, folder: Path, profile: str, parameters: dict, digest: str) -> float:
    """Run one notebook in a kernel of its own, check what it left and stamp it; returns the seconds it took."""
    name = path.stem
    executed, partial, failed = (folder / f"{stem}.ipynb" for stem in (name, f".{name}.partial", f"{name}.failed"))
    result = folder / "results" / f"{name}.json"
    # From here on nothing of an earlier run looks complete.
    old = [stamps.stamp_file(folder, name), folder / "results.json", folder / "report" / "index.html"]
    for stale in [*old, folder / "report" / f"{name}.html", executed, failed, result]:
        stale.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    partial.touch()
    start, start_ns = time.perf_counter(), partial.stat().st_mtime_ns  # by the clock of the file system
    try:
        _execute(path, partial, failed, parameters)
        try:
            _read_result(result, name, profile, start_ns)
        except RunError as error:
            partial.replace(failed)
            raise RunError(f"{error}\nSee {failed}") from error
        partial.replace(executed)
    finally:
        partial.unlink(missing_ok=True)
    seconds = time.perf_counter() - start
    stamps.write_stamp(folder, name, digest, start_ns, seconds)
    return seconds


def _execute(path: Path, output: Path, failed: Path, parameters: dict) -> None:
    # The environment's own kernel, even where the user has installed another of the same name.
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    import papermill
    from nbclient.exceptions import DeadKernelError

    try:
        with followed():
            executed = _interruptible(
                papermill.execute_notebook,
                path,
                output,
                parameters=parameters,
                kernel_name="python3",
                language="python",
                cwd=ROOT,
                progress_bar=False,
                extra_arguments=["--log-level=ERROR"],  # the kernel's: it warns at every start that it talks over TCP
            )
    except papermill.PapermillExecutionError as error:
        output.replace(failed)
        where = f"cell In [{error.exec_count}] raised {error.ename}: {error.evalue}"
        raise RunError(f"{path.name}: {where}\nSee {failed}") from error
    except DeadKernelError as error:
        output.replace(failed)
        raise RunError(f"{path.name}: its kernel died ({error}), perhaps for lack of memory\nSee {failed}") from error
    # papermill takes sys.exit(0) for a success and leaves out the cells that follow.
    states = [cell.metadata.papermill.status for cell in executed.cells if cell.cell_type == "code"]
    if set(states) != {"completed"}:
        output.replace(failed)
        number = 1 + next(index for index, state in enumerate(states) if state != "completed")
        raise RunError(f"{path.name}: code cell {number} of {len(states)} ended the notebook\nSee {failed}")


def _interruptible(work: Callable, *arguments, **options) -> object:
    """work(...) in a thread of its own; at an interruption its kernel is killed before KeyboardInterrupt goes on.

    nbclient, in the main thread, answers Ctrl-C by closing sockets it still polls: at times libzmq then aborts the
    process and the kernel stays behind. In another thread it leaves the signal to us.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, *arguments, **options)
        try:
            return future.result()
        except KeyboardInterrupt:
            while not future.done():  # a kernel may still be starting: it dies in the next round
                for process in psutil.Process().children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                wait([future], timeout=0.2)
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def _read_result(path: Path, name: str, profile: str, start_ns: int = 0) -> dict:
    """The result a notebook wrote; RunError when it is missing, older than its start, or not its own."""
    if not path.is_file():
        raise RunError(f"{name}.ipynb ran to its end, but wrote no result: {path} is missing")
    if path.stat().st_mtime_ns < start_ns:
        raise RunError(f"{name}.ipynb ran to its end, but its result is stale: {path} is older than its start")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = (content["notebook"], content["profile"])
        if found != (name, profile):
            raise RunError(f"{path} belongs to {found}, expected {(name, profile)}")
        if not content["metrics"]:
            raise RunError(f"{path} holds no metrics")
        if not all(math.isfinite(value) for value in content["metrics"].values()):
            raise RunError(f"{path} holds metrics that are not finite numbers: {content['metrics']}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is not a result file: {error!r}") from error
    return content


def _conclude(names: list[str], folder: Path, profile: Profile) -> int:
    """Collect the results, print the verdicts, write the report; 1 when an expected claim was not shown to hold."""
    results = {name: _read_result(folder / "results" / f"{name}.json", name, profile.name) for name in names}
    metrics = {name: result["metrics"] for name, result in results.items()}
    judged = [one for name in names for one in verdicts.judge(name, metrics[name], profile)]
    seconds = {name: stamps.read_stamp(folder, name)["seconds"] for name in names}
    rows = [{"id": one.id, "notebook": one.notebook, **verdicts.row(one)} for one in judged]
    content = {"profile": profile.name, "seconds": seconds, "metrics": metrics, "verdicts": rows}
    write_text(folder / "results.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    report = folder / "report"
    for name in names:
        pages.write_page_once(folder / f"{name}.ipynb", report / f"{name}.html")
    pages.write_index(report / "index.html", profile, seconds, judged)
    print(f"\n{verdicts.text_table(judged, list(verdicts.WIDTHS))}\n\n{pages.summary(judged)}")
    print(f"Report: {report / 'index.html'}", flush=True)
    failing = [one for one in judged if one.fails_run]
    for one in failing:
        print(f"FAILED: {one.notebook}: {one.claim}: {one.verdict} (measured: {one.measured})", file=sys.stderr)
    return 1 if failing else 0
