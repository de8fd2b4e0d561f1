"""Profiles: the default one, and clear refusals."""

import pytest

from slimllm_nb import calibration, sources
from slimllm_nb.reproduce import cost, profiles, start
from slimllm_nb.reproduce.profiles import ProfileError, load_profile, run_folder


def test_the_embedded_profile():
    profile = load_profile("embedded")
    assert (profile.model, profile.seed) == ("embedded", 42)
    assert (profile.calibration.num_samples, profile.calibration.length) == (32, 128)
    found = {key: (s.pruning_ratio, s.pruned_layers, s.alpha, s.checkpoint) for key, s in profile.settings.items()}
    assert found == {"20": (0.25, 24, 10, "model"), "50": (0.55, 28, 7, "model-50")}


def test_run_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SLIMLLM_NB_RUNS", str(tmp_path))
    assert run_folder("embedded") == tmp_path / "embedded"
    monkeypatch.delenv("SLIMLLM_NB_RUNS")
    assert run_folder("embedded") == profiles.ROOT / "runs" / "embedded"


def test_an_unknown_profile_is_refused_with_the_known_ones():
    with pytest.raises(ProfileError, match=r"unknown profile 'llama-8b'; allowed: .*embedded"):
        load_profile("llama-8b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("pruning_ratio: 0.25", "pruning_ratio: 1.2"), r"settings.20.pruning_ratio: .*less than 1 \(found 1.2\)"),
        (
            ("corpus: news", "corpus: books"),
            r"unknown corpus 'books'; allowed: news, wikipedia, hamlet, debates, bookcorpus",
        ),
        (("corpus: news", "corpus: hamlet"), "hamlet is for judging alone: name another corpus to calibrate on"),
        (("seed: 42", "seed: 42\nsed: 1"), "sed: there is no such setting: remove it"),
        (("name: embedded", "name: other"), "name is 'other'; it must be 'embedded'"),
        (("seed: 42", "seed: [42"), "is not valid YAML"),
    ],
)
def test_a_broken_profile_is_refused(change, message, monkeypatch, tmp_path):
    text = (profiles.PROFILES / "embedded.yaml").read_text().replace(*change)
    (tmp_path / "embedded.yaml").write_text(text)
    monkeypatch.setattr(profiles, "PROFILES", tmp_path)
    with pytest.raises(ProfileError, match=message) as caught:
        load_profile("embedded")
    assert "embedded.yaml" in str(caught.value)


def test_the_example_of_ones_own_model_and_texts(tmp_path, monkeypatch):
    section = (profiles.ROOT / "docs" / "your-model.md").read_text(encoding="utf-8")
    python, text = (section.partition(f"```{kind}\n")[2].partition("```")[0] for kind in ("python", "yaml"))
    monkeypatch.chdir(tmp_path)
    exec(python)
    (tmp_path / "mine" / "mine.yaml").write_text(text)
    profile = load_profile("mine/mine.yaml")
    assert profile.model == str(tmp_path / "mine" / "my-llama")
    model = sources.load_model(profile.model, **profile.loading | {"device": "cpu"})
    assert sum(p.numel() for p in model.parameters()) == cost.estimate(profile, False).parameters
    tokenizer = sources.load_tokenizer(profile.model, **profile.tokenizing)
    texts = sources.load_texts("my-news", "calibration", profile.texts)
    assert calibration.draw_samples(texts, tokenizer).shape == (32, 128)
    assert len(sources.load_texts("my-articles", "held-out", profile.texts)) > 100
    assert profile.settings["30"].arguments["target_parameters"] == 0.7
    assert profile.settings["30"].mean_ratio(30) == pytest.approx(0.3 * 30 / 26)


PARTS = """
from pathlib import Path
from slimllm_nb.methods import register

with (Path(__file__).parent / "runs.txt").open("a") as log:
    log.write("run\\n")


@register.channel_score("norms_of_a_profile")
def norms(input_norms):
    return input_norms
"""


def own_method(folder, method: str):
    (folder / "parts.py").write_text(PARTS)
    text = (profiles.PROFILES / "embedded.yaml").read_text().replace("name: embedded", "name: own")
    (folder / "own.yaml").write_text(f"{text}method: {method}\nparts: [parts.py]\n")
    return folder / "own.yaml"


def test_a_method_of_ones_own_in_a_profile(tmp_path):
    profile = load_profile(str(own_method(tmp_path, "{channel_score: norms_of_a_profile, name: mine}")))
    assert profile.settings["20"].arguments["method"] == {"channel_score": "norms_of_a_profile", "name": "mine"}
    assert profile.settings["20"].amount == load_profile("embedded").settings["20"].arguments  # without the method
    assert profile.method_name == "mine"
    before = start.made_from(profile, {})
    assert (tmp_path / "runs.txt").read_text() == "run\n"  # once, however often the files are asked for
    with (tmp_path / "parts.py").open("a") as file:
        file.write("# changed\n")
    assert start.made_from(profile, {}) != before


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("flapp", "profile own: unknown method 'flapp'; allowed: flap"),
        ("{recovery: rigde}", "profile own: unknown recovery 'rigde'; allowed: bias"),
        ("{channel_selection: {name: keep_lowest, keep_lowest: 1.0}}", "profile own: keep_lowest is 1.0; allowed"),
    ],
)
def test_a_wrong_method_in_a_profile(method, message, tmp_path):
    with pytest.raises(ProfileError, match=message):
        load_profile(str(own_method(tmp_path, method)))


def test_a_file_of_parts_that_cannot_be_run(tmp_path):
    path = own_method(tmp_path, "slimllm")
    (tmp_path / "parts.py").write_text("raise RuntimeError('no')")
    with pytest.raises(ProfileError, match=r"profile own: .*parts\.py cannot be run: RuntimeError: no"):
        load_profile(str(path))
