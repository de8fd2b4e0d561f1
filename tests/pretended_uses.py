"""What else runs on a GPU, on the pretend accelerator: the same numbers as on the CPU. Not collected by itself: see
test_pretend.py. Notebooks run on it in test_stand_in.py."""

import copy

import pandas
import pytest
import torch
import yaml

import hub_folder
import pretend
from conftest import make_small_model
from slimllm_nb import evaluation
from slimllm_nb.comparison import compare
from slimllm_nb.disk import checkpoint_perplexity, prune_checkpoint
from slimllm_nb.evaluation.speed import measure_speed
from slimllm_nb.evaluation.zeroshot import zeroshot
from slimllm_nb.export import save_checkpoint, to_stock
from slimllm_nb.export.gguf import write_gguf
from slimllm_nb.pruning import prune
from slimllm_nb.sources import load_model

pretend.install()
AMOUNT = {"pruning_ratio": 0.4, "pruned_layers": 3, "alpha": 2.0, "progress": False}
IDS = torch.randint(3, 1000, (16, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer():
    return hub_folder.make_tokenizer()


@pytest.fixture(scope="module")
def dense():
    return make_small_model(2, vocab_size=1000, max_position_embeddings=512, pad_token_id=2)


@pytest.fixture(scope="module")
def source(dense, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    dense.save_pretrained(folder, max_shard_size="50KB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pruned(dense):
    return prune(dense, IDS, **AMOUNT)[0]


def there(model):
    return copy.deepcopy(model).to("pretend")


def weights(folder):
    return {name: one.cpu() for name, one in load_model(str(folder)).state_dict().items()}


def chosen(report):
    return [(one.kept_heads, one.kept_channels) for one in report.layers]


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(one.cpu(), expected[name]) for name, one in found.items())


def test_pruning_from_disk_and_with_less_memory(source, tmp_path, monkeypatch):
    """A halved batch: the same choices, weights but for the order of sums."""
    options = AMOUNT | {"batch_size": 16}
    expected = prune_checkpoint(source, tmp_path / "cpu", IDS, **options, device="cpu")
    before = pretend.state.peak = pretend.state.live
    report = prune_checkpoint(source, tmp_path / "out", IDS, **options, device="auto")
    assert chosen(report) == chosen(expected)
    assert_equal(weights(tmp_path / "out"), weights(tmp_path / "cpu"))
    needed = pretend.state.peak - before
    monkeypatch.setattr(pretend.state, "limit", pretend.state.live + needed - 1)
    with pytest.warns(UserWarning, match="out of memory; from here on 8 samples at a time"):
        report = prune_checkpoint(source, tmp_path / "less", IDS, **options, device="auto")
    assert chosen(report) == chosen(expected)
    monkeypatch.setattr(pretend.state, "limit", pretend.state.live + needed // 4)
    with pytest.warns(UserWarning), pytest.raises(MemoryError, match=r"decoder layer .: out of memory with one sample"):
        prune_checkpoint(source, tmp_path / "none", IDS, **options, device="auto")


def test_perplexity(dense, source):
    found = evaluation.perplexity(there(dense), IDS, progress=False)
    assert found == evaluation.perplexity(dense, IDS, progress=False)
    from_disk = checkpoint_perplexity(source, {"ids": IDS}, device="auto", progress=False)["ids"]
    assert from_disk == checkpoint_perplexity(source, {"ids": IDS}, progress=False)["ids"]


def test_zeroshot(pruned, tokenizer):
    options = {"tasks": ["continuation"], "limit": 4, "batch_size": 3, "progress": False}
    found = zeroshot(there(pruned), tokenizer, **options)
    pandas.testing.assert_frame_equal(found, zeroshot(pruned, tokenizer, **options))


def test_speed_and_generation(dense, pruned):
    table = measure_speed(
        {"dense": there(dense), "pruned": there(pruned)}, batch_sizes=(2,), prompt_length=8, new_tokens=3, repeats=1
    )
    assert (table["median"] > 0).all()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    found = there(pruned).generate(IDS[:2].to("pretend"), **options)
    assert found.cpu().tolist() == pruned.generate(IDS[:2], **options).tolist()


def test_exports(pruned, tokenizer, tmp_path):
    assert_equal(to_stock(there(pruned)).state_dict(), to_stock(pruned).state_dict())
    for name, one in (("pretend", there(pruned)), ("cpu", pruned)):
        save_checkpoint(one, tokenizer, tmp_path / name)
        write_gguf(one, tmp_path / f"{name}.gguf", tokenizer, pre_tokenizer="gpt-2")
    assert_equal(weights(tmp_path / "pretend"), weights(tmp_path / "cpu"))
    assert (tmp_path / "pretend.gguf").read_bytes() == (tmp_path / "cpu.gguf").read_bytes()


def test_compare(source, tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMLLM_NB_RUNS", str(tmp_path / "runs"))
    content = {"name": "own", "description": "own", "model": str(source), "seed": 1}
    content |= {"calibration": {"corpus": "news", "num_samples": 8, "length": 16}}
    content |= {"evaluation": {"corpora": ["wikipedia"], "block_length": 16, "max_tokens": 256}}
    content |= {"settings": {"20": {"pruning_ratio": 0.3, "pruned_layers": 3, "alpha": 1, "checkpoint": "model"}}}
    tables = []
    for device in ("auto", "cpu"):
        (tmp_path / device).mkdir()
        path = tmp_path / device / "own.yaml"
        path.write_text(yaml.safe_dump(content | {"device": device}))
        tables.append(compare(["slimllm", "flap", "random"], profile=str(path), seeds=1, progress=False))
    assert [one.perplexity for one in tables[0].rows] == [one.perplexity for one in tables[1].rows]
