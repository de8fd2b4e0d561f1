"""Zero-shot accuracy of a profile's dense and pruned models on all questions, into runs/<profile>/zeroshot.json.

The models are pruned anew from the profile, so that the file needs nothing but the settings that stand in it. The
embedded profile takes the local tasks (about a quarter of an hour on two CPU cores), the others the paper's seven.
`make reference` keeps what came out in data/zeroshot/.
"""

import argparse
import json
import sys
import time
from datetime import date
from importlib.metadata import version

from slimllm_nb.calibration import draw_samples
from slimllm_nb.command import command
from slimllm_nb.evaluation import count_parameters
from slimllm_nb.evaluation.zeroshot import LOCAL, zeroshot
from slimllm_nb.files import commit, write_text
from slimllm_nb.pruning import prune
from slimllm_nb.reproduce import load_profile, run_folder
from slimllm_nb.sources import load_model, load_texts, load_tokenizer

PACKAGES = ("lm-eval", "torch", "transformers")


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/zeroshot.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--profile",
        default="embedded",
        help="a name of data/profiles, or a .yaml file of your own",
    )
    parser.add_argument("--limit", type=int, help="only the first so many questions; shown, not written")
    parser.add_argument("--device", help="where the models run (default: as the profile says)")
    options = parser.parse_args(arguments)
    content = measure(options.profile, options.limit, options.device)
    if options.limit is None:
        path = run_folder(load_profile(options.profile).name) / "zeroshot.json"
        write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        print(f"Written: {path}")
    return 0


def measure(profile_name: str, limit: int | None, device: str | None) -> dict:
    """The table, and all that made it."""
    profile, start = load_profile(profile_name), time.perf_counter()
    asked = profile.zeroshot
    tasks, options = (asked.tasks, {"add_bos_token": asked.add_bos_token}) if asked else (LOCAL, {})
    dense = load_model(profile.model, **profile.loading | ({"device": device} if device else {}))
    tokenizer = load_tokenizer(profile.model, **profile.tokenizing)
    calibration, rows = profile.calibration, []
    texts = load_texts(calibration.corpus, "calibration", profile.texts)
    input_ids = draw_samples(texts, tokenizer, calibration.num_samples, calibration.length, profile.seed)
    for name, setting in {"dense": None, **profile.settings}.items():
        model = dense if setting is None else prune(dense, input_ids, **setting.arguments)[0]
        parameters = count_parameters(model)["model"]
        table = zeroshot(model, tokenizer, tasks, limit=limit, **options)
        print(f"{name}, {parameters:,} parameters\n{table.to_string(index=False)}\n", flush=True)
        rows += [{"model": name, "parameters": parameters, **row} for row in table.to_dict("records")]
    return {
        "profile": profile.model_dump(),
        "commit": commit(),
        "date": date.today().isoformat(),
        "dtype": str(dense.dtype).removeprefix("torch."),
        "device": str(dense.device),
        "versions": {package: version(package) for package in PACKAGES},
        "seconds": round(time.perf_counter() - start),
        "rows": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
