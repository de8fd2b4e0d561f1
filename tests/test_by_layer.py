"""A profile without notebooks, one decoder layer at a time: the same numbers as with whole models in memory."""

import json
from pathlib import Path

import pytest
import torch

from conftest import make_small_model
from slimllm_nb import calibration, disk, evaluation, sources
from slimllm_nb.disk import checkpoint_perplexity
from slimllm_nb.pruning import prune
from slimllm_nb.reproduce import by_layer, cost, judge, load_profile, start
from slimllm_nb.reproduce.claims import NOTEBOOK
from slimllm_nb.sources import SourceError
from slimllm_nb.sources.checkpoints import checkpoint_folder
from test_comparison import folder, profile  # noqa: F401  fixtures


@pytest.fixture
def blocks(generator):
    return {"one": torch.randint(0, 101, (7, 12), generator=generator), "two": torch.randint(0, 101, (2, 12))}


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("waiting", [1 << 30, 1])
def test_perplexity_layer_by_layer(pruned, waiting, blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "HIDDEN_BYTES", waiting)  # a byte: three blocks at a time, then from disk again
    model = make_small_model(2)
    if pruned:
        model, _ = prune(model, blocks["one"], pruning_ratio=0.4, pruned_layers=3, alpha=1.0, progress=False)
    model.save_pretrained(tmp_path)
    found = checkpoint_perplexity(tmp_path, blocks, batch_size=3, progress=False)
    for corpus, ids in blocks.items():
        assert found[corpus] == pytest.approx(evaluation.perplexity(model, ids, progress=False), rel=1e-6)


def test_perplexity_in_float32_of_tied_half_precision(blocks, tmp_path):
    make_small_model(2, tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(tmp_path)
    found = checkpoint_perplexity(tmp_path, blocks, dtype=torch.float32, progress=False)
    model = sources.load_model(str(tmp_path), dtype=torch.float32)
    for corpus, ids in blocks.items():
        assert found[corpus] == pytest.approx(evaluation.perplexity(model, ids, progress=False), rel=1e-6)


def test_what_cannot_be_measured_is_refused(blocks, tmp_path):
    model = make_small_model(2)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mean negative log-likelihood on one is nan"):
        checkpoint_perplexity(tmp_path, blocks, progress=False)
    too_long = torch.zeros(1, model.config.max_position_embeddings + 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"a sample of blocks of long has .* tokens"):
        checkpoint_perplexity(tmp_path, {"long": too_long}, progress=False)
    with pytest.raises(SourceError, match=r"has no config.json"):
        checkpoint_perplexity(tmp_path / "nowhere", blocks, progress=False)


def in_memory(profile) -> dict[str, float]:  # noqa: F811
    """What by_layer.py measures, with whole models."""
    model, tokenizer = sources.load_model(profile.model), sources.load_tokenizer(profile.model)
    wanted, asked = profile.calibration, profile.evaluation
    texts = sources.load_texts(wanted.corpus, "calibration", profile.texts)
    input_ids = calibration.draw_samples(texts, tokenizer, wanted.num_samples, wanted.length, profile.seed)
    found = {}
    models = {"dense": model}
    for key, setting in profile.settings.items():
        models[f"{key}_slimllm"], report = prune(model, input_ids, **setting.arguments, progress=False)
        found[f"decoder_share_left_{key}_slimllm"] = report.decoder.share_left
        found[f"decoder_share_removed_{key}"] = 1 - report.decoder.share_left
        found[f"model_share_removed_{key}"] = 1 - report.model.share_left
    for corpus in asked.corpora:
        held_out = sources.load_texts(corpus, "held-out", profile.texts)
        blocks = evaluation.token_blocks(held_out, tokenizer, asked.block_length, asked.max_tokens)
        for name, one in models.items():
            found[f"ppl_{name}_{corpus}"] = evaluation.perplexity(one, blocks, progress=False)
    return found


@pytest.fixture
def walks(monkeypatch):
    """The names of the walks through a stored model's layers, as they begin."""
    names, real = [], disk.StoredLayers.begun

    def noted(self, name):
        names.append(name)
        return real(self, name)

    monkeypatch.setattr(disk.StoredLayers, "begun", noted)
    return names


@pytest.mark.slow
def test_the_command(profile, folder, tmp_path, capsys, walks):  # noqa: F811
    """All numbers as in memory; what is there is not measured again, nor the dense layers' similarities; a checkpoint
    that loads."""
    command = ["--profile", str(folder / "tiny.yaml"), "--by-layer"]
    assert start.main(command) == 0
    out = capsys.readouterr().out
    assert walks == ["layer similarity", "pruning", "pruning"]
    content = json.loads((tmp_path / "tiny" / by_layer.FILE).read_text())
    assert list(content["metrics"]) == ["dense", "20", "50"]
    measured = {name: value for one in content["metrics"].values() for name, value in one.items()}
    expected = in_memory(profile)
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value, rel=1e-6), name
    assert "verdict" in out and "50_slimllm: perplexity" in out
    dense, loaded = (
        evaluation.count_parameters(sources.load_model(str(one)))["decoder"]
        for one in (profile.model, tmp_path / "tiny" / "model-50")
    )
    assert loaded / dense == pytest.approx(measured["decoder_share_left_50_slimllm"])

    config = tmp_path / "tiny" / "model" / "config.json"
    content["metrics"].pop("50")
    (tmp_path / "tiny" / by_layer.FILE).write_text(json.dumps(content))
    before = config.stat().st_mtime_ns
    assert start.main(command) == 0
    assert config.stat().st_mtime_ns == before
    assert "20 %:" not in (out := capsys.readouterr().out) and "50 %:" in out
    assert walks[3:] == ["pruning"]


@pytest.mark.slow
def test_similarities_outlast_what_comes_after_them(profile, folder, tmp_path, monkeypatch, walks):  # noqa: F811
    """Cut off while the first pruned model is measured: the dense layers are not walked through again."""
    from slimllm_nb import disk

    measure = disk.checkpoint_perplexity

    def cut_off(model, *others, **options):
        if tmp_path in Path(model).parents:
            raise KeyboardInterrupt
        return measure(model, *others, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(disk, "checkpoint_perplexity", cut_off)
        by_layer.run(profile, tmp_path / "tiny")
    assert walks == ["layer similarity", "pruning"]
    by_layer.run(profile, tmp_path / "tiny")
    assert walks == ["layer similarity", "pruning", "pruning", "pruning"]


def test_another_dense_model_than_the_published_one_is_not_pruned(profile, folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    missed = judge(NOTEBOOK, {}, load_profile("llama-7b-20"))[:1]
    monkeypatch.setattr(by_layer, "not_as_published", lambda metrics, profile: missed)
    command = ["--profile", str(folder / "tiny.yaml"), "--by-layer"]
    assert start.main(command) == 2
    assert "nothing was pruned: the dense model is not the one that the paper measured" in capsys.readouterr().err
    assert not (tmp_path / "tiny" / "model").exists()
    monkeypatch.setenv("ALLOW_DENSE_MISMATCH", "1")
    assert start.main(command) == 0


def test_a_machine_that_is_too_small_goes_layer_by_layer(profile, folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    def too_large(*_):
        raise cost.TooLargeError("profile tiny needs 41 GB of GPU memory, and the GPU has 24 GB")

    monkeypatch.setattr(start, "announce", too_large)
    monkeypatch.setattr(by_layer, "run", lambda profile, folder: [])
    assert start.main(["--profile", str(folder / "tiny.yaml")]) == 0
    assert "and the GPU has 24 GB. Without the notebooks, one decoder layer at a time:" in capsys.readouterr().err


def test_the_folder_of_a_checkpoint(tmp_path, monkeypatch):
    assert checkpoint_folder(str(tmp_path)) == tmp_path
    assert (checkpoint_folder() / "config.json").is_file()
    (tmp_path / "models" / "owner" / "name").mkdir(parents=True)
    monkeypatch.setenv("SLIMLLM_NB_HUB", str(tmp_path))
    assert checkpoint_folder("owner/name") == tmp_path / "models" / "owner" / "name"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError, match="cannot load the model 'owner/other'"):
        checkpoint_folder("owner/other")


def test_a_method_that_asks_for_no_similarities(profile, folder, tmp_path, walks):  # noqa: F811
    """FLAP at two settings: nothing is handed from the first to the second."""
    text = (folder / "tiny.yaml").read_text().replace("name: tiny", "name: tiny-flap") + "method: flap\n"
    (folder / "tiny-flap.yaml").write_text(text)
    by_layer.run(load_profile(str(folder / "tiny-flap.yaml")), tmp_path / "tiny-flap")
    assert walks == ["dense scores", "pruning"] * 2
    content = json.loads((tmp_path / "tiny-flap" / by_layer.FILE).read_text())
    assert list(content["metrics"]) == ["dense", "20", "50"] and "similarity" not in content
