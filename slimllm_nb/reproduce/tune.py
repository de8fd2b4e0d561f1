"""python -m slimllm_nb.reproduce.tune: train a run's pruned models, merge, and write them beside (<checkpoint>-tuned).

Where a profile says tune: true, notebook 09 does the same. A training that was cut off goes on at its last evaluation.
"""

import argparse
import shutil
import sys
from pathlib import Path

from slimllm_nb.command import command
from slimllm_nb.comparison.protocol import protocol_of
from slimllm_nb.devices import find_device
from slimllm_nb.evaluation import perplexity, token_blocks
from slimllm_nb.export import save_checkpoint
from slimllm_nb.export.checkpoint import REPORT
from slimllm_nb.pruning.report import PruningReport
from slimllm_nb.reproduce.dense import held_out_blocks
from slimllm_nb.reproduce.profiles import Profile, ProfileError, load_profile, run_folder
from slimllm_nb.sources import load_model, load_tokenizer
from slimllm_nb.sources.instructions import instruction_sample, load_instructions
from slimllm_nb.trainer import Sample
from slimllm_nb.tuning import TuningReport, tune


def training_samples(profile: Profile, tokenizer) -> list[Sample]:
    """What the profile's models are trained on: instructions, or blocks of the texts that may be calibrated on. Raises:
    ProfileError for a profile that does not say how to train; SourceError for what cannot be loaded."""
    tuning = profile.tuning
    if tuning is None:
        raise ProfileError(f"profile {profile.name} has no setting tuning: how to train (see recipe.Tuning)")
    if tuning.instructions is not None:
        rows = load_instructions(tuning.instructions, tuning.revision)
        return [instruction_sample(row, tokenizer, tuning.length) for row in rows]
    texts = protocol_of(profile).calibration_texts(profile.texts)
    return [(block, block) for block in token_blocks(texts, tokenizer, tuning.length)]


def tune_checkpoint(
    profile: Profile, key: str, samples: list[Sample], folder: Path | None = None, progress: bool = True
) -> tuple[object, TuningReport]:
    """The trained model of the profile's setting `key`, saved in the run folder, and the report of its training."""
    folder, setting = folder or run_folder(profile.name), profile.settings[key]
    source = folder / setting.checkpoint
    if not (source / REPORT).is_file():
        raise ProfileError(f"{source} holds no pruned model yet: make reproduce PROFILE={profile.name}")
    work = folder / f".{setting.checkpoint}-tuned.work"
    device = find_device(profile.device)
    dtype = "float32" if device.type == "cpu" else profile.dtype  # half precision is not trained on a CPU
    model = load_model(str(source), dtype=dtype, device=device)
    options = {"recipe": profile.tuning.recipe, "seed": profile.seed, "progress": progress}
    model, report = tune(model, samples, folder=work, **options)
    pruned = PruningReport.model_validate_json((source / REPORT).read_text(encoding="utf-8"))
    rows = [{"step": step, "validation loss": loss} for step, loss in {0: report.before, **report.validation}.items()]
    tokenizer = load_tokenizer(profile.model, revision=profile.revision)
    target = folder / f"{setting.checkpoint}-tuned"
    save_checkpoint(model, tokenizer, target, report=pruned, results=rows, base_model=profile.model)
    shutil.rmtree(work)
    return model, report


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slimllm_nb.reproduce.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="embedded", help="a name of data/profiles, or a .yaml file of your own")
    parser.add_argument("--settings", help="by comma: the profile's keys, such as 20,50 (default: all)")
    options = parser.parse_args(arguments)
    profile = load_profile(options.profile)
    keys = options.settings.split(",") if options.settings else list(profile.settings)
    if unknown := set(keys) - profile.settings.keys():
        raise ProfileError(f"--settings: {', '.join(sorted(unknown))}; allowed: {', '.join(profile.settings)}")
    tokenizer = load_tokenizer(profile.model, **profile.tokenizing)
    samples, held_out = training_samples(profile, tokenizer), held_out_blocks(profile, tokenizer)
    for key in keys:
        model, report = tune_checkpoint(profile, key, samples)
        said = f"{report.steps} steps, {report.tokens:,} tokens, {report.seconds / 60:.1f} min"
        print(f"{key} %: {said}; validation loss {report.before:.3f} -> {report.validation[report.best_step]:.3f}")
        for corpus, blocks in held_out.items():
            print(f"  perplexity on {corpus}: {perplexity(model, blocks):.2f}")
        print(f"  {run_folder(profile.name) / profile.settings[key].checkpoint}-tuned", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
