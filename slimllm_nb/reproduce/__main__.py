"""Judge the paper's claims by what the notebooks left, and write the report: python -m slimllm_nb.reproduce

`make reproduce` runs them first (start.py, notebook.py). Exit status: 0 when every claim that is expected to hold does;
1 when not; 2 where a notebook's result is missing or is none.
"""

import argparse
import json
import sys
from pathlib import Path

from slimllm_nb.command import command
from slimllm_nb.files import write_text
from slimllm_nb.reproduce import pages, verdicts
from slimllm_nb.reproduce.profiles import load_profile, run_folder
from slimllm_nb.reproduce.tables import write_tables


@command
def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m slimllm_nb.reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="embedded", help="a file of data/profiles, or the path of one of your own")
    parser.add_argument("notebooks", nargs="+", type=Path, help="executed, in the profile's run folder")
    options = parser.parse_args(arguments)
    profile = load_profile(options.profile)
    folder = run_folder(profile.name)
    report, names = folder / "report", [path.stem for path in options.notebooks]
    metrics = {name: verdicts.read_result(folder, name, profile.name) for name in names}
    judged = [one for name in names for one in verdicts.judge(name, metrics[name], profile)]
    seconds = {name: pages.seconds(folder / f"{name}.ipynb") for name in names}
    rows = [{"id": one.id, "notebook": one.notebook, **verdicts.row(one)} for one in judged]
    content = {"profile": profile.name, "seconds": seconds, "metrics": metrics, "verdicts": rows}
    write_text(folder / "results.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    for name in names:
        if not (report / f"{name}.html").is_file():  # a notebook that runs again takes its page away
            pages.write_page(folder / f"{name}.ipynb", report / f"{name}.html")
    pages.write_index(report / "index.html", profile, seconds, judged, write_tables(report))
    for title, some in verdicts.by_kind(judged).items():
        print(f"\n{title}\n\n{verdicts.text_table(some, list(verdicts.WIDTHS))}")
    print(f"\n{pages.summary(judged)}")
    print(f"Report: {report / 'index.html'}", flush=True)
    failing = [one for one in judged if one.fails_run]
    for one in failing:
        print(f"FAILED: {one.notebook}: {one.claim}: {one.verdict} (measured: {one.measured})", file=sys.stderr)
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
