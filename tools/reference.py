"""Keep what the runs of a profile left, as what tests and notebooks compare with: make reproduce; make reference

Writes data/results/<profile>.json from the run's results.json, and copies what `make zeroshot` and `make ablations`
left there, too, to data/. Look at `git diff` before you commit it.
"""

import argparse
import json
import sys
from datetime import date

from slimllm_nb.command import command
from slimllm_nb.files import commit, write_text
from slimllm_nb.reproduce.differences import KEPT as ABLATIONS
from slimllm_nb.reproduce.kept import RESULTS, ZEROSHOT
from slimllm_nb.reproduce.profiles import load_profile, run_folder


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make reference", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="embedded")
    profile = load_profile(parser.parse_args(arguments).profile).name
    found = [name for name in ("results", "zeroshot", "ablations") if (run_folder(profile) / f"{name}.json").is_file()]
    for name, kept in (("results", RESULTS), ("zeroshot", ZEROSHOT), ("ablations", ABLATIONS)):
        if name in found:
            text = (run_folder(profile) / f"{name}.json").read_text(encoding="utf-8")
            if name == "results":
                made = {"profile": profile, "commit": commit(), "date": date.today().isoformat()}
                text = json.dumps(made | {"metrics": json.loads(text)["metrics"]}, indent=1, sort_keys=True) + "\n"
            write_text(kept / f"{profile}.json", text)
            print(f"{name}: kept")
    if not found:
        print(f"Nothing to keep: {run_folder(profile)} holds no results; make reproduce comes first", file=sys.stderr)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
