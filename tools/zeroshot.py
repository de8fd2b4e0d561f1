"""Zero-shot accuracy of a profile's dense and pruned models on the full sets of questions, kept in data/zeroshot/.

The models are pruned anew from the profile, so that the file needs nothing but the settings that stand in it. The
embedded profile takes the local tasks (about 15 minutes on two CPU cores), the others the paper's seven.
"""

import argparse
import json
import sys
import time
from importlib.metadata import version

from slimllm_nb.calibration import draw_samples
from slimllm_nb.evaluation import count_parameters
from slimllm_nb.paper import write_text
from slimllm_nb.profiles import ROOT, ProfileError, load_profile
from slimllm_nb.pruning import prune
from slimllm_nb.sources import load_model, load_texts, load_tokenizer
from slimllm_nb.zeroshot import LOCAL, PAPER, zeroshot

PACKAGES = ("lm-eval", "torch", "transformers")


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/zeroshot.py", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="embedded", help="a file of data/profiles (default: embedded)")
    parser.add_argument("--limit", type=int, help="only the first so many questions; the table is shown and not kept")
    parser.add_argument("--device", default="cpu", help="where the models run (default: cpu)")
    options = parser.parse_args()
    try:
        profile = load_profile(options.profile)
    except ProfileError as error:
        print(f"Nothing was run: {error}", file=sys.stderr)
        return 2
    tasks = LOCAL if profile.model == "embedded" else PAPER
    dense, tokenizer = load_model(profile.model, device=options.device), load_tokenizer(profile.model)
    calibration = profile.calibration
    texts = load_texts(calibration.corpus, "calibration")
    input_ids = draw_samples(texts, tokenizer, calibration.num_samples, calibration.length, profile.seed)
    rows, start = [], time.perf_counter()
    for name, setting in {"dense": None, **profile.settings}.items():
        model = dense
        if setting is not None:
            settings = setting.model_dump(exclude={"checkpoint"})
            model, _ = prune(dense, input_ids, **settings)
        parameters = count_parameters(model)["model"]
        table = zeroshot(model, tokenizer, tasks, limit=options.limit)
        print(f"{name}, {parameters:,} parameters\n{table.to_string(index=False)}\n", flush=True)
        rows += [{"model": name, "parameters": parameters, **row} for row in table.to_dict("records")]
    content = {
        "profile": profile.model_dump(),
        "dtype": str(dense.dtype).removeprefix("torch."),
        "device": options.device,
        "versions": {package: version(package) for package in PACKAGES},
        "seconds": round(time.perf_counter() - start),
        "rows": rows,
    }
    if options.limit is None:
        path = ROOT / "data" / "zeroshot" / f"{profile.name}.json"
        write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        print(f"Written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
