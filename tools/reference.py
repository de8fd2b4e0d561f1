"""Keep the numbers of a run as the tests' reference: runs/embedded/results/*.json -> tests/reference/*.json"""

import json
from pathlib import Path

from slimllm_nb import paper, profiles

TARGET = Path(__file__).resolve().parent.parent / "tests" / "reference"

for source in sorted((profiles.run_folder("embedded") / "results").glob("*.json")):
    metrics = json.loads(source.read_text(encoding="utf-8"))["metrics"]
    rounded = {name: float(f"{value:.6g}") for name, value in metrics.items()}
    paper.write_text(TARGET / source.name, json.dumps(rounded, indent=1) + "\n")
    print(f"{source.name}: {len(rounded)} numbers")
