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
    folder, kept = run_folder(profile), {"results": RESULTS, "zeroshot": ZEROSHOT, "ablations": ABLATIONS}
    left = {name: folder / f"{name}.json" for name in kept if (folder / f"{name}.json").is_file()}
    texts = {name: path.read_text(encoding="utf-8") for name, path in left.items()}
    if "results" in texts:
        made = {"profile": profile, "commit": commit(), "date": date.today().isoformat()}
        content = made | {"metrics": json.loads(texts["results"])["metrics"]}
        texts["results"] = json.dumps(content, indent=1, sort_keys=True) + "\n"
    for name, text in texts.items():
        write_text(kept[name] / f"{profile}.json", text)
        print(f"{name}: kept")
    if not texts:
        print(f"Nothing to keep: {folder} holds no results; make reproduce comes first", file=sys.stderr)
    return 0 if texts else 1


if __name__ == "__main__":
    sys.exit(main())
