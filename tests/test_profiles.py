"""Profiles: the default one, and clear refusals."""

import pytest

from slimllm_nb.reproduce import profiles
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
        (("corpus: news", "corpus: books"), r"unknown corpus 'books'; allowed: news, wikipedia, bookcorpus"),
        (("seed: 42", "seed: 42\nsed: 1"), r"sed: .*not permitted"),
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
