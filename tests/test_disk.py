"""prune_checkpoint does what prune() does, one layer at a time, from disk to disk."""

import json
import shutil
import weakref
from importlib import import_module

import pytest
import torch
from transformers import AutoModelForCausalLM

import conftest
from conftest import make_small_model
from slimllm_nb.devices import DeviceError
from slimllm_nb.disk import StoredModel, prune_checkpoint
from slimllm_nb.llama import layer_widths, queries_per_key_value_head
from slimllm_nb.pruning import layer_similarities, prune
from slimllm_nb.sources import SourceError, load_model
from test_checkpoint import tokenizer  # noqa: F401  a fixture

RATIO = {"pruning_ratio": 0.4, "pruned_layers": 3, "alpha": 2.0}
SHARE = {"target_parameters": 0.7, "target_of": "decoder", "pruned_layers": 3, "alpha": 2.0}
QUIET = {"progress": False, "batch_size": 3}


@pytest.fixture
def input_ids(generator):
    return torch.randint(0, 101, (8, 10), generator=generator)


@pytest.fixture
def save(tmp_path, tokenizer):  # noqa: F811
    def saved(model, name: str = "source", shard: str = "20KB"):
        model.save_pretrained(tmp_path / name, max_shard_size=shard)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return saved


def without_seconds(report) -> dict:
    content = report.model_dump()
    content.pop("seconds")
    for layer in content["layers"]:
        layer.pop("seconds")
    return content


def widths(layer) -> tuple:
    return layer_widths(layer), queries_per_key_value_head(layer.self_attn)


def assert_same(folder, report, model, expected_report, dtype="auto"):
    """The same report, config and weights, bit for bit, as what prune() gave."""
    assert without_seconds(report) == without_seconds(expected_report)
    found = load_model(str(folder), dtype=dtype)
    assert [widths(one) for one in found.model.layers] == [widths(one) for one in model.model.layers]
    tensors, expected = found.state_dict(), model.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert json.loads((folder / "pruning_report.json").read_text())["method"] == report.method


@pytest.mark.parametrize(("method", "amount"), [("slimllm", RATIO), ("obs_ridge", SHARE), ("flap", RATIO)])
def test_the_same_as_in_memory(method, amount, small_model, input_ids, save, tmp_path):
    source = save(small_model)
    expected = prune(small_model, input_ids, **amount, method=method, **QUIET)
    report = prune_checkpoint(source, tmp_path / "out", input_ids, **amount, method=method, **QUIET)
    assert_same(tmp_path / "out", report, *expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(loaded(input_ids).logits, expected[0](input_ids).logits)


def test_tied_embeddings_one_file_and_a_similarity_that_is_known(input_ids, save, tmp_path):
    model = make_small_model(2, tie_word_embeddings=True)
    source, similarity = save(model, shard="5GB"), layer_similarities(model, input_ids, **QUIET)
    report = prune_checkpoint(source, tmp_path / "out", input_ids, **RATIO, similarity=similarity, **QUIET)
    assert_same(tmp_path / "out", report, *prune(model, input_ids, **RATIO, **QUIET))


def test_half_precision_stays_and_float32_can_be_asked_for(input_ids, save, tmp_path):
    source = save(make_small_model(2).to(torch.bfloat16))
    for dtype, name in (("auto", torch.bfloat16), (torch.float32, torch.float32)):
        report = prune_checkpoint(source, tmp_path / "out", input_ids, **RATIO, dtype=dtype, **QUIET)
        expected = prune(load_model(str(source), dtype=name), input_ids, **RATIO, **QUIET)
        assert_same(tmp_path / "out", report, *expected)
        assert load_model(str(tmp_path / "out"), dtype="auto").dtype == name


def test_what_is_outside_the_layers_stays_as_it_is_on_disk(input_ids, save):
    model = make_small_model(2).to(torch.bfloat16)
    stored = StoredModel(save(model), torch.float32)
    outside = [stored.skeleton.model.embed_tokens, stored.skeleton.model.norm, stored.skeleton.lm_head]
    assert {one.weight.dtype for one in outside} == {torch.bfloat16}
    embedded = stored.embed(input_ids)
    assert embedded.dtype == torch.float32
    assert torch.equal(embedded, model.model.embed_tokens(input_ids).float())
    assert stored.layer(0).mlp.up_proj.weight.dtype == torch.float32


def test_what_is_pruned_can_be_pruned_again(input_ids, save, tmp_path):
    model = make_small_model(4)
    prune_checkpoint(save(model), tmp_path / "once", input_ids, **RATIO, **QUIET)
    report = prune_checkpoint(tmp_path / "once", tmp_path / "twice", input_ids, **RATIO, **QUIET)
    once = prune(model, input_ids, **RATIO, **QUIET)[0]
    assert_same(tmp_path / "twice", report, *prune(once, input_ids, **RATIO, **QUIET))


class Cut:
    """A channel score that fails with `error` when layer `index` is scored for the first time."""

    def __init__(self, error: BaseException, index: int):
        self.error, self.index = error, index

    def __call__(self, input_norms, layer_index):
        if layer_index == self.index and self.error is not None:
            error, self.error = self.error, None
            raise error
        return input_norms


def scored_by(cut: Cut) -> dict:
    """The same method every time: what it names are modules."""
    conftest.cut = cut
    return {"name": "cut", "channel_score": cut_score, "recovery": "none"}


def cut_score(input_norms, layer_index):
    return conftest.cut(input_norms, layer_index)


@pytest.fixture
def read(monkeypatch):
    """The layers that are read from disk, in order; and that no more than one is in memory."""
    numbers, alive, real = [], [], StoredModel.layer

    def layer(self, index):
        numbers.append(index)
        assert sum(one() is not None for one in alive) <= 1
        module = real(self, index)
        alive.append(weakref.ref(module))
        return module

    monkeypatch.setattr(StoredModel, "layer", layer)
    return numbers


def test_one_layer_is_in_memory_at_a_time(input_ids, save, tmp_path, read):
    prune_checkpoint(save(make_small_model(2)), tmp_path / "out", input_ids, **RATIO, **QUIET)
    assert read == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("amount", [RATIO, SHARE])
def test_it_goes_on_where_it_was_cut_off(amount, input_ids, save, tmp_path, read):
    model = make_small_model(2)
    source, call = save(model), {**amount, **QUIET}
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(source, tmp_path / "out", input_ids, **call, method=scored_by(Cut(KeyboardInterrupt(), 2)))
    assert read == [0, 1, 2, 3, 0, 1, 2] and not (tmp_path / "out").exists()
    read.clear()
    report = prune_checkpoint(source, tmp_path / "out", input_ids, **call, method=scored_by(Cut(None, 0)))
    assert read == [2, 3]
    expected = prune(model, input_ids, **call, method=scored_by(Cut(None, 0)))
    assert_same(tmp_path / "out", report, *expected)
    assert not (tmp_path / ".out.work").exists()


@pytest.mark.parametrize("changed", ["settings", "samples", "source"])
def test_it_starts_anew_when_something_else_is_asked_for(changed, input_ids, save, tmp_path, read):
    model = make_small_model(2)
    source, amount = save(model), dict(RATIO)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(
            source, tmp_path / "out", input_ids, **amount, **QUIET, method=scored_by(Cut(KeyboardInterrupt(), 2))
        )
    if changed == "settings":
        amount["pruning_ratio"] = 0.5
    elif changed == "samples":
        input_ids = input_ids.flip(0)
    else:
        model = make_small_model(4)
        shutil.rmtree(source)
        save(model)
    read.clear()
    report = prune_checkpoint(source, tmp_path / "out", input_ids, **amount, **QUIET, method=scored_by(Cut(None, 0)))
    assert read == [0, 1, 2, 3] * 2
    expected = prune(model, input_ids, **amount, **QUIET, method=scored_by(Cut(None, 0)))
    assert_same(tmp_path / "out", report, *expected)


def test_out_of_memory_halves_the_batch_and_says_so(input_ids, save, tmp_path):
    model, options = make_small_model(2), {"progress": False, "batch_size": 8}
    method = scored_by(Cut(torch.OutOfMemoryError("CUDA out of memory"), 1))
    with pytest.warns(UserWarning, match="decoder layer 1: out of memory; from here on 4 samples at a time"):
        report = prune_checkpoint(save(model), tmp_path / "out", input_ids, **RATIO, **options, method=method)
    expected = prune(model, input_ids, **RATIO, **options, method=scored_by(Cut(None, 0)))[1]
    assert [one.kept_heads for one in report.layers] == [one.kept_heads for one in expected.layers]
    assert [one.kept_channels for one in report.layers] == [one.kept_channels for one in expected.layers]
    with pytest.raises(MemoryError, match="decoder layer 1: out of memory with one sample at a time"):
        prune_checkpoint(
            tmp_path / "source",
            tmp_path / "out",
            input_ids,
            **RATIO,
            progress=False,
            batch_size=1,
            method=scored_by(Cut(torch.OutOfMemoryError("again"), 1)),
        )


def test_a_halved_batch_stays_halved_in_the_walks_that_follow(input_ids):
    module, sizes = import_module("slimllm_nb.pruning.prune"), []

    def step(layer, batches, context, index):
        sizes.append(len(batches[0]))
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return None, {}

    layers = module.Layers(make_small_model(2), 8)
    with pytest.warns(UserWarning, match="from here on 4 samples at a time"):
        module.walk(layers, "first", step, input_ids, False)
    module.walk(layers, "second", step, input_ids, False)
    assert sizes == [8] + [4] * 8


def lacking(source):
    (source / "config.json").unlink()


def damaged(source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 90}))


def short(source):
    sorted(source.glob("*.safetensors"))[-1].unlink()


def other(source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "qwen3"}))


def pickled(source):
    for path in source.glob("*.safetensors*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lacking, r"source has no config\.json; allowed: a folder with a LLaMA"),
        (damaged, r"has shape \(80, 48\); its config says \(90, 48\)|has shape \(48, 80\)"),
        (short, "lacks 1 of its files of weights"),
        (other, r"model_type 'qwen3' \(it normalises queries and keys\); allowed: 'llama'"),
        (
            pickled,
            r"has no weights in safetensors; allowed: .*\. Pickles .* python -m slimllm_nb.sources.convert",
        ),
    ],
)
def test_a_source_that_is_not_whole(spoil, message, input_ids, save, tmp_path):
    source = save(make_small_model(2))
    spoil(source)
    with pytest.raises(SourceError, match=message):
        prune_checkpoint(source, tmp_path / "out", input_ids, **RATIO, **QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "llm_pruner"}, ValueError, "method llm_pruner asks for gradients"),
        ({"method": "slim"}, ValueError, "unknown method 'slim'; allowed"),
        ({"pruning_ratio": 1.5}, ValueError, "1.5"),
        ({"pruned_layers": 9}, ValueError, "pruned_layers is 9"),
        ({"target_parameters": 0.5}, ValueError, "give exactly one of them"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"device": "cuda:7"}, DeviceError, "device is 'cuda:7'"),
    ],
)
def test_settings_are_refused_before_a_layer_is_read(options, error, message, input_ids, save, tmp_path, read):
    if torch.cuda.is_available() and "device" in options:
        pytest.skip("there is an accelerator")
    source = save(make_small_model(2))
    with pytest.raises(error, match=message):
        prune_checkpoint(source, tmp_path / "out", input_ids, **(RATIO | QUIET | options))
    assert not read and sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_target_that_holds_something_else_and_a_full_disk(input_ids, save, tmp_path, read, monkeypatch):
    source = save(make_small_model(2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out exists and holds no checkpoint"):
        prune_checkpoint(source, tmp_path / "out", input_ids, **RATIO, **QUIET)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ValueError, match=r"has 0\.0 GB free; .* may take .* GB: give a target on another disk"):
        prune_checkpoint(source, tmp_path / "new", input_ids, **RATIO, **QUIET)
    assert not read and sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
