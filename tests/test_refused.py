"""Inputs that users of other pruning tools reported, kind by kind: the right value, or one clear message, and early."""

import json
import re
import shutil

import gguf
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

import export
import zeroshot as zeroshot_tool
from conftest import make_small_model
from slimllm_nb import calibration, generated
from slimllm_nb.comparison import __main__ as comparison
from slimllm_nb.disk import prune_checkpoint
from slimllm_nb.evaluation import perplexity, token_blocks
from slimllm_nb.evaluation.zeroshot import ZeroShotError, zeroshot
from slimllm_nb.export import save_checkpoint, to_stock
from slimllm_nb.export.gguf import LLAMA_3, write_gguf
from slimllm_nb.pruning import layer_similarities, prune
from slimllm_nb.reproduce import start
from slimllm_nb.sources import SourceError, load_model, load_tokenizer
from test_checkpoint import tokenizer  # noqa: F401  a fixture

SETTINGS = {"pruning_ratio": 0.4, "pruned_layers": 3, "alpha": 2.0, "progress": False}


@pytest.fixture
def ids(generator):
    return torch.randint(3, 101, (8, 10), generator=generator)


@pytest.fixture
def source(tmp_path, tokenizer):  # noqa: F811
    """A folder with a small LLaMA and its tokenizer."""
    make_small_model(2).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


# --- checkpoints ----------------------------------------------------------------------------------------------------


def weights(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def biases_of_qwen(folder):
    weights(folder, lambda one: one | {"model.layers.1.self_attn.k_proj.bias": torch.ones(8)})


def float8(folder):
    weights(folder, lambda one: {k: v.to(torch.float8_e4m3fn) if "proj" in k else v for k, v in one.items()})


def scales(folder):
    weights(folder, lambda one: one | {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)})


CHECKPOINTS = {
    "biases of Qwen": (
        biases_of_qwen,
        r"holds 1 weights that a LLaMA with its config has no place for, the first is "
        r"model\.layers\.1\.self_attn\.k_proj\.bias",
    ),
    "scales": (scales, r"no place for, the first is model\.layers\.0\.mlp\.up_proj\.weight_scale"),
    "float8": (float8, r"model\.layers\.0\.\S+proj\.weight is of F8_E4M3; allowed: F64, F32, F16, BF16"),
    "quantized": (
        lambda folder: config(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"is quantized \(gptq, its config's quantization_config\): take the model that it was made from",
    ),
    "biases that the config promises": (
        lambda folder: config(folder, attention_bias=True),
        r"lacks 16 weights, the first is model\.layers\.0\.self_attn\.k_proj\.bias",
    ),
    "another number of key/value heads": (
        lambda folder: config(folder, num_key_value_heads=4),
        r"model\.layers\.0\.self_attn\.k_proj\.weight",
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints_that_are_not_what_they_say(case, source, ids, tmp_path):
    change, message = CHECKPOINTS[case]
    change(source)
    for use in (load_model, lambda name: prune_checkpoint(name, tmp_path / "out", ids, **SETTINGS)):
        with pytest.raises(SourceError, match=message):
            use(str(source))
    assert not (tmp_path / "out").exists()


def test_what_is_made_of_a_quantized_source_is_not_quantized(ids, tmp_path, tokenizer):  # noqa: F811
    model = make_small_model(2)
    model.config.quantization_config = {"quant_method": "gguf"}
    for number, made in enumerate([prune(model, ids, **SETTINGS)[0], to_stock(model)]):
        save_checkpoint(made, tokenizer, tmp_path / f"once{number}")
        again = save_checkpoint(load_model(str(tmp_path / f"once{number}")), tokenizer, tmp_path / f"twice{number}")
        assert "quantization_config" not in json.loads((again / "config.json").read_text())


def test_the_dense_model_is_not_written_over(source, ids, monkeypatch):
    with pytest.raises(ValueError, match=r"source and target are both .*source; allowed: another folder"):
        prune_checkpoint(source, source, ids, **SETTINGS)
    monkeypatch.setenv("HOME", str(source.parent))
    assert load_model("~/source").config.num_hidden_layers == 4
    assert load_tokenizer("~/source").vocab_size == 101
    report = prune_checkpoint("~/source", "~/out", ids, **SETTINGS)
    assert report.model.after < report.model.before and (source.parent / "out" / "config.json").is_file()


# --- models in memory -----------------------------------------------------------------------------------------------


class Int8Tensor(torch.Tensor):
    """As torchao's: says that it is of float32."""

    def dequantize(self):
        return self


def quantized(model):
    module = model.model.layers[1].mlp.up_proj
    module.weight = torch.nn.Parameter(module.weight.detach().as_subclass(Int8Tensor), requires_grad=False)


def four_bits(model):
    kind = type("Linear4bit", (torch.nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model.model.layers[2].self_attn.q_proj.__class__ = kind


def heads(model):
    model.config.num_key_value_heads = 4


def fewer_layers(model):
    del model.model.layers[2]


MODELS = {
    "adapters": (
        lambda model: get_peft_model(model, LoraConfig(target_modules=["o_proj", "down_proj"])) and None,
        r"o_proj of layer 0 is lora\.Linear: merge_and_unload\(\) first",
    ),
    "torchao": (quantized, r"up_proj of layer 1 holds \S+ of torch\.float32: load the model without quantization"),
    "nf4": (four_bits, r"q_proj of layer 2 is bitsandbytes\.Linear4bit: allowed: nn\.Linear, so load .* without quant"),
    "a layer less": (fewer_layers, "the model has 3 decoder layers, its config says num_hidden_layers 4"),
    "other heads": (heads, r"layer 0 has Widths\(heads=8, key_value_heads=2, .*, its config says .*key_value_heads=4"),
}


@pytest.mark.parametrize("case", MODELS)
def test_layers_that_are_not_plain_or_not_as_the_config_says(case, ids, tmp_path, tokenizer):  # noqa: F811
    change, message = MODELS[case]
    change(model := make_small_model(2))
    uses = [
        lambda: prune(model, ids, **SETTINGS),
        lambda: to_stock(model),
        lambda: save_checkpoint(model, tokenizer, tmp_path / "out"),
        lambda: write_gguf(model, tmp_path / "out.gguf"),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=message):
            use()
    assert not list(tmp_path.iterdir())


def test_a_wrapped_model_is_to_be_unwrapped(ids, unchecked):
    with pytest.raises(ValueError, match=r"the model is a Peft\w+, with adapters: merge_and_unload\(\) first"):
        prune(get_peft_model(make_small_model(2), LoraConfig(target_modules=["o_proj"])), ids, **SETTINGS)


def test_dropout_is_off_and_the_mode_stays(ids):
    model = make_small_model(2, attention_dropout=0.5)
    expected = perplexity(model, ids, progress=False), prune(model, ids, **SETTINGS)[1].layers
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    found = perplexity(model, ids, progress=False), prune(model, ids, **SETTINGS)[1].layers
    assert found[0] == expected[0]
    assert torch.equal(layer_similarities(model, ids, progress=False), layer_similarities(model.eval(), ids))
    for one, other in zip(found[1], expected[1], strict=True):
        assert (one.kept_heads, one.kept_channels) == (other.kept_heads, other.kept_channels)
    model.train()
    model.model.layers[0].eval()
    assert [module.training for module in model.modules()] == modes


def test_what_is_pruned_can_be_trained(ids):
    pruned, _ = prune(make_small_model(2), ids, **SETTINGS)
    for model in (pruned, to_stock(pruned)):
        model(ids, labels=ids).loss.backward()
        assert all(one.grad is not None for one in model.parameters())


# --- samples and texts ----------------------------------------------------------------------------------------------

INPUTS = {
    "one string": (lambda t, m, x: token_blocks("one string", t), "texts is one string; allowed: a list of strings"),
    "numbers": (lambda t, m, x: generated.windows([1, 2], t, 2), "a list of other things than strings"),
    "a string to draw from": (lambda t, m, x: calibration.draw_samples("w1 w2", t, 2), "texts is one string"),
    "a batch": (
        lambda t, m, x: prune(m, t(["w1 w2"], return_tensors="pt"), **SETTINGS),
        r"input_ids is a BatchEncoding; allowed: a tensor of integers, .* such as tokenizer\(...\)\['input_ids'\]",
    ),
    "a list": (lambda t, m, x: perplexity(m, x.tolist()), "blocks is a list; allowed: a tensor of integers"),
    "padding": (
        lambda t, m, x: prune(m, t(["w1 w2 w3", "w4"], return_tensors="pt", padding=True)["input_ids"], **SETTINGS),
        r"input_ids holds padding \(token 0\) in 1 samples, the first is sample 1",
    ),
    "padded blocks": (
        lambda t, m, x: perplexity(m, torch.cat([torch.zeros(8, 3, dtype=torch.long), x], 1)),
        r"blocks holds padding \(token 0\) in 8 samples",
    ),
    "one row": (lambda t, m, x: perplexity(m, x[0]), r"blocks is torch.int64 of shape \(10,\); allowed"),
    "no block": (lambda t, m, x: perplexity(m, x[:0]), r"blocks is torch.int64 of shape \(0, 10\); allowed"),
    "one token": (lambda t, m, x: perplexity(m, x[:, :1]), r"of shape \(8, 1\); .* at least one sample and two tokens"),
    "floats": (lambda t, m, x: prune(m, x.float(), **SETTINGS), r"input_ids is torch.float32 of shape \(8, 10\)"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs_of_another_kind(case, unchecked, tokenizer, ids):  # noqa: F811
    use, message = INPUTS[case]
    model = make_small_model(2)
    model.config.pad_token_id = tokenizer.pad_token_id = 0
    with pytest.raises(ValueError, match=message):
        use(tokenizer, model, ids)


def test_integers_of_every_width_are_read(ids):
    model = make_small_model(2)
    assert perplexity(model, ids.int(), progress=False) == perplexity(model, ids, progress=False)
    found, expected = (prune(model, one, **SETTINGS)[1].layers[0].kept_channels for one in (ids.int(), ids))
    assert found == expected


# --- commands -------------------------------------------------------------------------------------------------------

PROFILE = """
name: mine
description: a small one
seed: 0
model: {model}
device: {device}
texts:
  notes: {{files: [{text}]}}
calibration: {{corpus: notes, num_samples: 2, length: 8}}
evaluation: {{corpora: [wikipedia], block_length: 8, max_tokens: 64}}
settings:
  "20": {{pruning_ratio: 0.25, pruned_layers: 2, alpha: 1, checkpoint: model}}
"""
FAULTS = {
    "Mistral": ({"model": "mistral"}, "'mistral' with a sliding window of 4096 tokens; allowed: 'llama'"),
    "no model": ({"model": "nowhere"}, "no model"),
    "no text": ({"text": "nowhere.txt"}, "nowhere.txt"),
    "another encoding": ({"text": "latin.txt"}, r"cannot read the text file \S+latin.txt: 'utf-8' codec"),
    "another device": ({"device": "gpu"}, "device: String should match"),
}
COMMANDS = {
    "compare": lambda path: comparison.main(["--profile", path, "--methods", "slimllm", "--seeds", "1"]),
    "zeroshot": lambda path: zeroshot_tool.main(["--profile", path]),
    "dense": lambda path: start.main(["--profile", path]),
    "by layer": lambda path: start.main(["--profile", path, "--by-layer"]),
}


@pytest.mark.parametrize("case", FAULTS)
def test_commands_end_in_one_line(case, source, tmp_path, monkeypatch, capsys):
    changes, message = FAULTS[case]
    monkeypatch.setenv("SLIMLLM_NB_RUNS", str(tmp_path / "runs"))
    small = MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=101
    )
    MistralForCausalLM(small).save_pretrained(tmp_path / "mistral")
    (tmp_path / "notes.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9\n\n" * 300)
    (tmp_path / "latin.txt").write_bytes("Caf\xe9 ".encode("latin-1") * 900)
    values = {"model": "source", "device": "cpu", "text": "notes.txt"} | changes
    for name in ("model", "text"):
        values[name] = str(tmp_path / values[name])
    (tmp_path / "mine.yaml").write_text(PROFILE.format(**values))
    for name, run in COMMANDS.items():
        status = run(str(tmp_path / "mine.yaml"))
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert status in (1, 2) and "Traceback" not in error, (name, error)
        assert re.search(message, error), (name, error)


# --- files for llama.cpp --------------------------------------------------------------------------------------------


def bpe(*steps) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    return PreTrainedTokenizerFast(tokenizer_object=made)


def byte_level(use_regex: bool):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


LLAMA_3_STEPS = (pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), byte_level(False))
TOKENIZERS = {
    "llama-bpe": LLAMA_3_STEPS,
    "smollm": (pre_tokenizers.Digits(individual_digits=True), byte_level(True)),
    "gpt-2": (byte_level(True),),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_how_a_tokenizer_cuts_text_is_recognised(name, tmp_path):
    path = write_gguf(make_small_model(2), tmp_path / "model.gguf", bpe(*TOKENIZERS[name]))
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == name


def test_a_gguf_of_a_profile_of_ones_own(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLIMLLM_NB_RUNS", str(tmp_path / "runs"))
    (tmp_path / "notes.txt").write_text("w1 w2\n\n" * 3000)
    (tmp_path / "mine.yaml").write_text(
        PROFILE.format(model=source, device="cpu", text=tmp_path / "notes.txt"), encoding="utf-8"
    )
    folder = tmp_path / "runs" / "mine" / "model"
    shutil.copytree(source, folder)

    def run(steps, *options: str) -> tuple[int, str]:
        bpe(*steps).save_pretrained(folder)
        status = export.main(["gguf", "--profile", str(tmp_path / "mine.yaml"), *options, "model"])
        return status, "".join(capsys.readouterr())

    unknown = (pre_tokenizers.Digits(), byte_level(False))
    assert run(LLAMA_3_STEPS)[0] == 0
    status, said = run(unknown)
    assert status == 2 and "is not recognised" in said and "PRE_TOKENIZER=llama-bpe" in said
    assert run(unknown, "--pre-tokenizer", "qwen2")[0] == 0
    status, said = run(unknown, "--pre-tokenizer", "lama-bpe")
    assert status == 2 and "pre_tokenizer is 'lama-bpe'; allowed: default, llama3, llama-v3, llama-bpe" in said
    pieces = (pre_tokenizers.Metaspace(),)
    status, said = run(pieces)
    assert status == 2 and "not byte-level BPE: write a file without a vocabulary (PRE_TOKENIZER=none" in said
    assert run(pieces, "--pre-tokenizer", "none")[0] == 0
    fields = gguf.GGUFReader(folder.with_name("model.gguf")).fields
    assert fields["tokenizer.ggml.model"].contents() == "no_vocab"


# --- tasks of one's own ---------------------------------------------------------------------------------------------

TASK = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{others}
"""
METRICS = {
    "exact_match": "output_type: generate_until\ngeneration_kwargs: {until: [' '], max_gen_toks: 3}\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]",
    "word_perplexity": "output_type: loglikelihood_rolling\n"
    "metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]",
    "acc_norm": "output_type: multiple_choice\ndoc_to_choice: [w1, w2]\n"
    "metric_list: [{metric: acc_norm, aggregation: mean, higher_is_better: true}]",
}


@pytest.mark.parametrize("metric", METRICS)
def test_a_task_with_another_metric(metric, tmp_path, tokenizer):  # noqa: F811
    rows = [{"question": "w3 w4 w5", "answer": "w1"}, {"question": "w6 w7", "answer": "w2"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = TASK.format(data=tmp_path / "rows.jsonl", others=METRICS[metric])
    (tmp_path / "mine.yaml").write_text(task)
    model = make_small_model(2, max_position_embeddings=512)
    table = zeroshot(model, tokenizer, ["mine"], task_folder=tmp_path, progress=False)
    (row,) = table.to_dict("records")
    assert row["metric"] == metric and row["accuracy"] >= 0 and row["questions"] == 2
    (tmp_path / "mine.yaml").write_text(task.partition("metric_list")[0] + "metric_list: []\n")
    with pytest.raises(ZeroShotError, match="the task 'mine' has no metric"):
        zeroshot(model, tokenizer, ["mine"], task_folder=tmp_path, progress=False)
