"""A paper profile from the first line to the last on stand-ins: the model and data sets of the hub lie in a folder.

Every line of the hub's path runs but the download; the profile is llama-7b-20.yaml with another model and table, and
notebooks run on the pretend accelerator (pretend.py). The table is what the library measures by itself, on the CPU,
so the run must find its own numbers again.
"""

import csv
import json
import os
import re
import shutil
import subprocess

import datasets
import pytest
import yaml

import hub_folder
from slimllm_nb import evaluation, pruning, sources
from slimllm_nb.calibration import draw_samples
from slimllm_nb.evaluation.zeroshot import zeroshot
from slimllm_nb.files import ROOT
from slimllm_nb.reproduce import load_profile
from slimllm_nb.reproduce.profiles import PROFILES
from slimllm_nb.sources.hub import HUB_VARIABLE
from workplace import make, write_notebook

pytestmark = pytest.mark.notebook
SAVE = """
from slimllm_nb import reproduce
settings = reproduce.load_profile(profile)
folder = reproduce.run_folder(settings.name)
reproduce.save_results(folder, "06_evaluation", {"ppl_20_slimllm_ptb": 1.0}, [], profile=settings.name)
"""
PARTS = """
from slimllm_nb.methods import register


@register.channel_score("norms_of_stand_in")
def norms(input_norms, output_weight):
    return input_norms * output_weight.norm(dim=0)
"""
COLUMNS = ["ratio_percent", "tuned", "method", "wikitext2_ppl", "ptb_ppl"]


def write_profile(folder, name: str, model: str, **others) -> None:
    profile = yaml.safe_load((PROFILES / "llama-7b-20.yaml").read_text())
    published = {"table": "published.csv", "source": "Table 0", "dense": "stand-in"}
    published["latency"] = {"prompt_length": 8, "new_tokens": 3, "batch": 2, "repeats": 1}
    settings = {"20": {"pruning_ratio": 0.25, "pruned_layers": 6, "alpha": 10, "checkpoint": "model"}}
    changes = {"name": name, "description": "a small LLaMA", "model": model, "published": published}
    recipe = {"samples": 40, "held_out": 8, "batch_size": 8, "epochs": 1, "evaluations": 2, "learning_rate": 0.001}
    tuning = profile["tuning"] | {"length": 96, "recipe": recipe}
    changes |= {"settings": settings, "dtype": "bfloat16", "tuning": tuning, "tune": False} | others
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(profile | changes))


def write_table(folder) -> None:
    """The published table of the stand-in: measured here, with the library's functions alone."""
    profile = yaml.safe_load((folder / "stand-in.yaml").read_text()) | {"published": None}
    (folder / "plain").mkdir()
    (folder / "plain" / "stand-in.yaml").write_text(yaml.safe_dump(profile))
    profile = load_profile(str(folder / "plain" / "stand-in.yaml"))
    model = sources.load_model(profile.model, **profile.loading)
    tokenizer = sources.load_tokenizer(profile.model, **profile.tokenizing)
    input_ids = draw_samples(sources.load_texts("bookcorpus", "calibration"), tokenizer)
    pruned = pruning.prune(model, input_ids, **profile.settings["20"].arguments, progress=False)[0]
    rows = []
    for percent, method, one in ((0, "stand-in", model), (20, "SlimLLM", pruned)):
        row = dict(zip(COLUMNS, (percent, "no", method), strict=False))
        for corpus in profile.evaluation.corpora:
            blocks = evaluation.token_blocks(sources.load_texts(corpus, "held-out"), tokenizer)
            row[f"{corpus}_ppl"] = evaluation.perplexity(one, blocks, progress=False)
        table = zeroshot(one, tokenizer, profile.zeroshot.tasks, limit=None, add_bos_token=False, progress=False)
        row |= {task: 100 * accuracy for task, accuracy in zip(table.task, table.accuracy, strict=True)}
        rows.append(row | {"average": 100 * table.accuracy.mean()})
    rows.append(rows[-1] | {"tuned": "yes"})  # of which nobody knows whether training will come near it
    with (folder / "published.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The hub, two profiles and the table."""
    folder = tmp_path_factory.mktemp("stand-in")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HUB_VARIABLE, str(folder / "hub"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setenv("SLIMLLM_NB_RUNS", str(folder / "runs"))
        hub_folder.write_hub(folder / "hub")
        write_profile(folder, "stand-in", "stand-in/llama", tune=True)
        evaluation = {"corpora": ["ptb"], "block_length": 128}
        write_profile(folder, "spoilt", "stand-in/spoilt", evaluation=evaluation, zeroshot=None)
        write_table(folder)
        method = {"name": "mine", "channel_score": "norms_of_stand_in", "recovery": "ridge"}
        others = {"dtype": "float16", "parts": ["parts.py"], "zeroshot": None, "published": None}
        write_profile(folder, "own", "stand-in/llama", method=method, evaluation=evaluation, **others)
        (folder / "parts.py").write_text(PARTS)
        yield folder


PRETEND = {"PYTHONPATH": str(ROOT / "tests" / "pretended")}


def reproduce(place, name: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
    command = make("reproduce", f"PROFILE={place / f'{name}.yaml'}", *options)
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def copied(place, folder: str, *names: str) -> list[str]:
    """What runs these notebooks alone."""
    (place / folder).mkdir()
    for name in names:
        shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", place / folder)
    return [f"NOTEBOOKS={place / folder}"]


# Those that judge published numbers, and one before; the other profile runs another. Each runs in test_notebooks.py.
NOTEBOOKS = ["04_regression_recovery", "06_evaluation", "09_fine_tuning"]


@pytest.fixture(scope="module")
def finished(place):
    chosen = copied(place, "chosen", *NOTEBOOKS)
    return place / "runs" / "stand-in", reproduce(place, "stand-in", "OPTIONS=-p questions=4", *chosen, **PRETEND)


def test_notebooks_end_well(finished):
    folder, done = finished
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sorted(path.stem for path in folder.glob("*.ipynb")) == NOTEBOOKS
    assert json.loads((folder / "dense.json").read_text())["device"] == "pretend:0"
    assert (folder / "model" / "model.safetensors").is_file() and (folder / "model" / "modeling.py").is_file()
    assert "Profile stand-in: downloads up to " in done.stderr


def test_the_published_rows_hold_and_what_was_not_measured_says_so(finished):
    results = json.loads((finished[0] / "results.json").read_text())
    verdicts = {one["id"]: one["verdict"] for one in results["verdicts"]}
    rows = {name: verdict for name, verdict in verdicts.items() if name.startswith("stand-in-")}
    tuned = {name: rows.pop(name) for name in list(rows) if "-tuned-" in name}
    rows = {name: verdict for name, verdict in rows.items() if name.split("-")[-1] not in ("prefill", "decoding")}
    assert len(rows) == 2 * 10 and set(rows.values()) == {"holds"}, rows
    assert len(tuned) == 10 and "not run" not in tuned.values(), tuned
    speed = [verdicts.get(f"stand-in-20-{name}") for name in ("prefill", "decoding")]
    assert all(verdict in ("holds", "does not hold") for verdict in speed)
    # Laws hold on any model; no claim about news was measured.
    assert verdicts["regression-lowers-error"] == "holds"
    for missing in ("accuracy-20-above-50", "regression-50"):
        assert verdicts[missing] == "not run"


def test_the_trained_checkpoint_is_what_was_judged(finished, place):
    metrics = json.loads((finished[0] / "results.json").read_text())["metrics"]["09_fine_tuning"]
    profile = load_profile(str(place / "stand-in.yaml"))
    model, tokenizer = sources.load_model(str(finished[0] / "model-tuned")), sources.load_tokenizer(profile.model)
    blocks = evaluation.token_blocks(sources.load_texts("wikitext2", "held-out"), tokenizer)
    measured = evaluation.perplexity(model, blocks, progress=False)
    assert metrics["ppl_20_slimllm_tuned_wikitext2"] == pytest.approx(measured, rel=0.02)  # there in half precision
    before = json.loads((finished[0] / "results.json").read_text())["metrics"]["06_evaluation"]
    assert metrics["ppl_20_slimllm_tuned_wikitext2"] != before["ppl_20_slimllm_wikitext2"]
    assert (
        not list(finished[0].glob(".*work"))
        and "validation loss" in (finished[0] / "model-tuned/README.md").read_text()
    )


def test_zero_shot_shows_the_floor_of_a_task(finished):
    dense = json.loads((finished[0] / "dense.json").read_text())
    rows = {row["task"]: row for row in dense["zeroshot"]}
    assert rows["boolq"]["majority"] == 3 / 4 and rows["winogrande"]["majority"] == 1 / 2
    assert rows["arc_easy"]["majority"] == rows["hellaswag"]["majority"] == 1 / 4
    assert dense["dtype"] == "bfloat16" and dense["off"] == []


def test_the_card_names_the_model_that_was_pruned(finished):
    card = (finished[0] / "model" / "README.md").read_text()
    assert "llama, pruned with SlimLLM" in card and "SmolLM2" not in card and "apache" not in card


def test_a_profile_with_a_method_of_its_own(place):
    """In float16. Its model is pruned with it; a notebook that takes SlimLLM apart runs all the same."""
    chosen = ("02_head_importance", "06_evaluation")
    done = reproduce(place, "own", "OPTIONS=-p questions=4", *copied(place, "own-notebooks", *chosen), **PRETEND)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    verdicts = json.loads((place / "runs" / "own" / "results.json").read_text())["verdicts"]
    verdicts = {one["id"]: one["verdict"] for one in verdicts}
    assert verdicts["greedy-never-worse"] == "holds" and verdicts["greedy-lowers-perplexity-50"] == "not run"
    checkpoint = place / "runs" / "own" / "model"
    assert "pruned with the method mine" in (checkpoint / "README.md").read_text()
    report = json.loads((checkpoint / "pruning_report.json").read_text())
    assert report["method"] == "mine" and any("penalty" in layer["mlp_notes"] for layer in report["layers"])


def test_a_spoilt_tokenizer_stops_the_run_before_anything_is_pruned(place):
    write_notebook(place / "notebooks", "06_evaluation", SAVE)
    options = (f"NOTEBOOKS={place / 'notebooks'}",)
    done = reproduce(place, "spoilt", *options)
    assert done.returncode == 2
    assert "The dense model is not the one that the paper measured (Table 0, stand-in):" in done.stderr
    assert "is close to guessing among 1,000 tokens: the tokenizer gives other numbers" in done.stderr
    for used in ("tokenizer: ", "beginning-of-sequence", "split: ptb valid", "block length: 128", "lm-eval: 0.4"):
        assert used in done.stderr
    assert "nothing was pruned: mend the profile, or set ALLOW_DENSE_MISMATCH=1" in done.stderr
    assert not list((place / "runs" / "spoilt").glob("*.ipynb"))

    allowed = reproduce(place, "spoilt", *options, ALLOW_DENSE_MISMATCH="1")
    assert "dense model ..." not in allowed.stdout  # it is not measured a second time
    assert "(dense model off)" in allowed.stdout and "so none of this is a reproduction" in allowed.stdout
    assert allowed.returncode == 2  # the published numbers were not shown to hold


def test_the_papers_ablations_are_measured_and_judged(place):
    """The plan of llama-7b-50, on the stand-in under that name; one zero-shot task in the place of seven."""
    task = {"zeroshot": {"tasks": ["piqa"]}, "dtype": "float32"}
    setting = {"50": {"pruning_ratio": 0.55, "pruned_layers": 6, "alpha": 7, "checkpoint": "model"}}
    write_profile(place, "llama-7b-50", "stand-in/llama", settings=setting, published=None, **task)
    command = make("ablations", f"PROFILE={place / 'llama-7b-50.yaml'}", "SWEEP=--workers 1")
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "15 rows" in done.stdout and "not run" not in done.stdout
    for number, rows in ((4, 4), (5, 4), (6, 2), (7, 6)):  # three numbers a row
        assert len(re.findall(rf"\| Table {number}: ", done.stdout)) == 3 * rows
