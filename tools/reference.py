"""Take the metrics of a run as what tests/test_notebooks.py compares with: make reproduce; make reference

Reads runs/embedded/results/<notebook>.json (or $SLIMLLM_NB_RUNS/embedded/results) of every committed notebook and
writes tests/reference/<notebook>.json; keeps what `make zeroshot` and `make ablations` left there, too, in data/. Look
at `git diff` before you commit it.
"""

import json
import sys

from slimllm_nb.files import ROOT, write_text
from slimllm_nb.reproduce import run_folder
from slimllm_nb.reproduce.differences import KEPT as ABLATIONS
from slimllm_nb.reproduce.kept import ZEROSHOT

PROFILE = "embedded"


def main() -> int:
    folder, references = run_folder(PROFILE), ROOT / "tests" / "reference"
    results = folder / "results"
    names = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    missing = [name for name in names if not (results / f"{name}.json").is_file()]
    for name in sorted(set(names) - set(missing)):
        metrics = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))["metrics"]
        content = {"profile": PROFILE, "metrics": dict(sorted(metrics.items()))}
        write_text(references / f"{name}.json", json.dumps(content, indent=1) + "\n")
        print(f"{name}: {len(metrics)} metrics")
    for path in references.glob("*.json"):
        if path.stem not in names:
            path.unlink()
            print(f"{path.stem}: removed, there is no such notebook")
    for name, kept in (("zeroshot", ZEROSHOT), ("ablations", ABLATIONS)):
        if (folder / f"{name}.json").is_file():
            write_text(kept / f"{PROFILE}.json", (folder / f"{name}.json").read_text(encoding="utf-8"))
            print(f"{name}: kept")
    if missing:
        print(f"Not run, reference left as it was: {', '.join(missing)} ({results} has no result)", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
