"""A checkpoint is used by other tools as it stands: reloaded without the package, generated from, tuned, compiled."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from conftest import make_small_model
from slimllm_nb.evaluation import count_parameters
from slimllm_nb.export import checkpoint
from slimllm_nb.export.checkpoint import markdown_table, save_checkpoint
from slimllm_nb.pruning import prune
from slimllm_nb.sources.embedded import CONVERTED

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = [{"model": "dense", "perplexity": 41.98765}, {"model": "20 %", "perplexity": 78.41}]

# Runs where the package cannot be imported, as in a user's own project.
USE = """
import sys, torch
from contextlib import chdir
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.modules["slimllm_nb"] = None  # importing it now raises ImportError
torch.set_num_threads(1)
exec(open("modes.py").read())
for name in sys.argv[1:]:
    card = (Path(name) / "README.md").read_text().split("```python")[1].split("```")[0]
    with chdir(name):
        exec(card, used := {})
    assert used["model"].device.type == "cpu" and used["tokenizer"].vocab_size == 101
    tokenizer = AutoTokenizer.from_pretrained(name)
    for device_map in (None, "auto"):
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, device_map=device_map)
        torch.save(use(model, tokenizer), f"{name}-{device_map}.pt")
"""
MODES = '''
TEXTS = ["w3 w14 w15 w92 w65", "w35 w8"]

@torch.no_grad()
def use(model, tokenizer):
    """Everything that a user does with a causal language model, by name."""
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    one = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1]}
    made = {"dtype": model.dtype, "logits": model(**batch).logits}
    made["greedy"] = model.generate(**one, max_new_tokens=8, do_sample=False)
    torch.manual_seed(7)
    made["sampling"] = model.generate(**one, max_new_tokens=8, do_sample=True, top_k=20)
    made["beam"] = model.generate(**one, max_new_tokens=8, do_sample=False, num_beams=3)
    made["left padding"] = model.generate(**batch, max_new_tokens=8, do_sample=False)
    return made
'''
exec(MODES)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """w0 ... w100, padded on the left as generation wants it."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(101)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w1", eos_token="w2", unk_token="w0", padding_side="left"
    )


def prune_small(key_value_heads=4, **settings):
    model = make_small_model(key_value_heads, pad_token_id=1, eos_token_id=2, bos_token_id=None, **settings)
    input_ids = torch.randint(0, 101, (6, 10), generator=torch.Generator().manual_seed(0))
    return prune(model, input_ids, pruning_ratio=0.4, pruned_layers=3, alpha=2.0, progress=False)


@pytest.mark.slow
def test_another_process_uses_it_without_the_package(tokenizer, tmp_path):
    expected, models = {}, {"multi-head": 8, "sharded": 4, "bfloat16": 2}
    for name, key_value_heads in models.items():
        model, report = prune_small(key_value_heads)
        model.generation_config.repetition_penalty = 1.2  # travels with the checkpoint, and changes what is generated
        if name == "bfloat16":
            rotary = copy.deepcopy(model.model.rotary_emb)
            model = model.bfloat16()
            model.model.rotary_emb = rotary  # as from_pretrained does: angles stay in float32
        size = "40KB" if name == "sharded" else "5GB"
        save_checkpoint(model, tokenizer, tmp_path / name, report=report, results=ROWS, max_shard_size=size)
        expected[name] = use(model, tokenizer)
        assert expected[name]["dtype"] == (torch.bfloat16 if name == "bfloat16" else torch.float32)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    (tmp_path / "modes.py").write_text(MODES)
    arguments = [sys.executable, "-c", USE, *models]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    for name in models:
        for device_map in ("None", "auto"):
            reloaded = torch.load(tmp_path / f"{name}-{device_map}.pt", weights_only=True)
            assert reloaded.keys() == expected[name].keys()
            assert reloaded.pop("dtype") == expected[name]["dtype"]
            for mode, tensor in reloaded.items():
                assert torch.equal(tensor, expected[name][mode]), (name, device_map, mode)


def test_what_is_generated_differs_by_mode(tokenizer):
    """Else the comparison above would say little."""
    made = use(prune_small(4)[0], tokenizer)
    rows = [made["greedy"], made["sampling"], made["beam"]]
    assert len({tuple(row.flatten().tolist()) for row in rows}) > 1
    assert made["left padding"][0].tolist() == made["greedy"][0].tolist()
    assert made["left padding"][1, :3].tolist() == [1, 1, 1]


def test_lora_attaches_trains_and_merges(tokenizer, tmp_path):
    save_checkpoint(prune_small(4)[0], tokenizer, tmp_path / "model")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").train()
    input_ids = torch.randint(0, 101, (4, 12))
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 4 * len(PROJECTIONS)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    with torch.no_grad():
        before = adapted.eval()(input_ids=input_ids).logits
        merged = adapted.merge_and_unload()
        after = merged(input_ids).logits
        assert (after - before).abs().max() <= 1e-5 * before.abs().max()
        # What was merged is a checkpoint again, without a trace of the adapter.
        save_checkpoint(merged, tokenizer, tmp_path / "merged")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(reloaded(input_ids).logits, after)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler, and there is no c++ here")
@torch.no_grad()
def test_compiled(tokenizer, tmp_path):
    dense, input_ids = make_small_model(4, num_hidden_layers=1), torch.randint(0, 101, (2, 9))
    pruned, _ = prune(dense, input_ids, pruning_ratio=0.4, pruned_layers=1, alpha=2.0, progress=False)
    assert any(hasattr(layer.self_attn, "uneven_groups") for layer in pruned.model.layers)
    model = AutoModelForCausalLM.from_pretrained(save_checkpoint(pruned, tokenizer, tmp_path / "model"))
    expected = model(input_ids).logits
    found = torch.compile(model, fullgraph=True)(input_ids).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_lies_in_the_folder(tokenizer, tmp_path):
    model, report = prune_small()
    folder = save_checkpoint(model, tokenizer, tmp_path / "made" / "model", report=report, results=ROWS)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["model"]  # nothing temporary is left
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling.py",
        "pruning_report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    assert type(report).model_validate_json((folder / "pruning_report.json").read_text()) == report
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert AutoTokenizer.from_pretrained(folder)("w7 w9").input_ids == [7, 9]
    for path in folder.iterdir():
        assert path.suffix == ".safetensors" or str(tmp_path) not in path.read_text(), path


def test_model_card(tokenizer, tmp_path):
    model, report = prune_small()
    folder = save_checkpoint(model, tokenizer, tmp_path / "m", report=report, results=ROWS, base_model="embedded")
    card = (folder / "README.md").read_text()
    head = card.split("---\n")[1]
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\nlicense: apache-2.0\n" in head
    assert f"{count_parameters(model)['model']:,} parameters" in card
    assert "| dense | 41.99 |\n| 20 % | 78.41 |" in card
    assert "pruning ratio 0.4000 over 3 layers, alpha 2" in card
    for layer in report.layers:
        heads, groups = len(layer.kept_heads), len(layer.kept_key_value_heads)
        row = f"| {layer.index} | {layer.ratio:.3f} | {heads} of 8 | {groups} | {len(layer.kept_channels)} of 80 |"
        assert row in card
    assert "trust_remote_code=True" in card


def test_model_card_of_a_dense_model_from_a_folder(tokenizer, tmp_path):
    base = tmp_path / "llama-of-mine"
    save_checkpoint(make_small_model(4), tokenizer, base)
    folder = save_checkpoint(make_small_model(4), tokenizer, tmp_path / "m", base_model=str(base), licence="mit")
    card = (folder / "README.md").read_text()
    assert "# llama-of-mine\n" in card and "license: mit\n" in card
    assert "base_model:" not in card and "trust_remote_code" not in card and str(tmp_path) not in card
    assert not (folder / "modeling.py").exists()


def test_a_card_names_no_other_model_than_the_one_that_was_pruned(tokenizer, tmp_path):
    dense = save_checkpoint(make_small_model(4), tokenizer, tmp_path / "llama-of-mine")
    card = (dense / "README.md").read_text()
    assert card.split("---\n")[1].startswith("license: other\n") and "# A LLaMA\n" in card
    assert "SmolLM2" not in card and "apache" not in card and "Base model: not known" in card
    loaded = AutoModelForCausalLM.from_pretrained(dense)
    input_ids = torch.randint(0, 101, (4, 10))
    pruned, report = prune(loaded, input_ids, pruning_ratio=0.4, pruned_layers=3, alpha=2.0, progress=False)
    card = (save_checkpoint(pruned, tokenizer, tmp_path / "m", report=report) / "README.md").read_text()
    assert "# llama-of-mine, pruned with SlimLLM\n" in card and "Base model: llama-of-mine" in card
    assert "SmolLM2" not in card and "apache" not in card and str(tmp_path) not in card
    pruned.config.name_or_path = str(tmp_path / "gone")
    card = (save_checkpoint(pruned, tokenizer, tmp_path / "m", report=report) / "README.md").read_text()
    assert "Base model: gone;" in card and str(tmp_path) not in card
    pruned.config.name_or_path = f"/cache/{CONVERTED}"  # as sources.load_model() leaves it
    card = (save_checkpoint(pruned, tokenizer, tmp_path / "m", report=report) / "README.md").read_text()
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\nlicense: apache-2.0\n" in card


def test_a_card_names_the_method(tokenizer, tmp_path):
    model, input_ids = make_small_model(4), torch.randint(0, 101, (6, 10))
    options = {"pruning_ratio": 0.4, "pruned_layers": 3, "alpha": 2.0, "progress": False}
    cards = {}
    for name in ("slimllm", "flap", "mine"):
        method = {"name": "mine", "recovery": "none"} if name == "mine" else name
        pruned, report = prune(model, input_ids, **options, method=method)
        folder = save_checkpoint(pruned, tokenizer, tmp_path / name, report=report)
        cards[name] = (folder / "README.md").read_text()
    assert (
        "pruned with SlimLLM\n" in cards["slimllm"] and "the shift of the paper's linear regression" in cards["slimllm"]
    )
    for name in ("flap", "mine"):
        assert f"pruned with the method {name}\n" in cards[name] and f"\n- method {name}\n" in cards[name]
        assert "SlimLLM" not in cards[name] and "regression" not in cards[name]


def test_the_loading_code_of_the_card_runs(tokenizer, tmp_path, monkeypatch):
    model, report = prune_small()
    folder = save_checkpoint(model, tokenizer, tmp_path / "m", report=report)
    code = (folder / "README.md").read_text().split("```python")[1].split("```")[0]
    monkeypatch.chdir(folder)
    scope = {}
    exec(code, scope)
    ids = torch.arange(20).reshape(2, 10)
    assert torch.equal(scope["model"](ids).logits, model(ids).logits)


def test_an_older_checkpoint_is_replaced_whole_or_kept(tokenizer, tmp_path, monkeypatch):
    model, report = prune_small()
    folder = save_checkpoint(model, tokenizer, tmp_path / "m", report=report)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(type(tokenizer), "save_pretrained", full)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(make_small_model(4), tokenizer, folder)
    with monkeypatch.context() as patched:
        patched.setattr(type(tmp_path), "rename", full)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(make_small_model(4), tokenizer, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    save_checkpoint(make_small_model(4), tokenizer, folder)
    assert not (folder / "pruning_report.json").exists() and not (folder / "modeling.py").exists()


def test_bad_input(tokenizer, tmp_path):
    model, _ = prune_small()
    small = copy.deepcopy(tokenizer)
    with pytest.raises(ValueError, match="is a Qwen2ForCausalLM of architecture 'qwen2'; allowed: "):
        tiny = Qwen2Config(vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
        save_checkpoint(Qwen2ForCausalLM(tiny), tokenizer, tmp_path / "m")
    with pytest.raises(ValueError, match="is a LlamaModel of architecture 'llama'"):
        tiny = LlamaConfig(vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
        save_checkpoint(LlamaModel(tiny), tokenizer, tmp_path / "m")
    tokenizer.add_tokens(["one-too-many"])
    with pytest.raises(ValueError, match="gives tokens 0 to 101, the model's vocabulary is 0 to 100"):
        save_checkpoint(model, tokenizer, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no checkpoint"):
        save_checkpoint(model, small, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_offloaded_weights_are_refused(tokenizer, tmp_path):
    with torch.device("meta"):
        model = make_small_model(4)
    with pytest.raises(ValueError, match="not in memory"):
        save_checkpoint(model, tokenizer, tmp_path / "m")


def test_markdown_table():
    assert markdown_table([{"a": 1.23456, "b": "x"}]) == "| a | b |\n| --- | --- |\n| 1.235 | x |"
    with pytest.raises(ValueError, match="no rows"):
        markdown_table([])
    with pytest.raises(ValueError, match=r"columns \['a'\] and \['b'\]"):
        markdown_table([{"a": 1}, {"b": 1}])


def test_decimal():
    assert [checkpoint.decimal(n) for n in (0, 12, 134_515_008, 6_738_415_616, 999_950)] == [
        "0 ",
        "12 ",
        "135 M",
        "6.74 G",
        "1 M",
    ]
