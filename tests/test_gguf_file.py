"""The GGUF file: what stands in it, and llama.cpp's logits from it."""

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from slimllm_nb.export.gguf import write_gguf
from slimllm_nb.llama import queries_per_key_value_head
from slimllm_nb.methods import method_names
from slimllm_nb.pruning import prune
from slimllm_nb.sources import load_tokenizer

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 500.0}
CASES = {
    "multi-head": {"num_key_value_heads": 8},
    "grouped": {"num_key_value_heads": 4},
    "groups of 4, tied, own biases": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "scaled rotation": {"num_key_value_heads": 8, "rope_parameters": LLAMA3},
    "dense": {"num_key_value_heads": 4},
    "obs_ridge": {"num_key_value_heads": 2},  # weights fitted anew, and biases
    "wanda_sp": {"num_key_value_heads": 4},  # no biases
}


def make(case: str) -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 8, "head_dim": 16, "max_position_embeddings": 128, "initializer_range": 0.15}
    model = LlamaForCausalLM(LlamaConfig(**(sizes | CASES[case]))).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    input_ids = torch.randint(0, 300, (6, 12), generator=torch.Generator().manual_seed(0))
    ratio = 0.0 if case == "dense" else 0.4
    method = case if case in method_names() else "slimllm"
    return prune(model, input_ids, pruning_ratio=ratio, pruned_layers=3, alpha=2.0, method=method, progress=False)[0]


def llama_cpp_logits(path, ids: list[int]) -> torch.Tensor:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (make test-engines)")
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    assert model, "llama.cpp does not load the file"
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 64
    settings.type_k = settings.type_v = 0  # a cache in float32, as transformers has it
    settings.flash_attn_type = 0  # flash attention, taken where it can be, rounds keys and values to half precision
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (vocabulary,)) for i in range(len(ids))]
    logits = torch.from_numpy(np.stack(rows).copy())
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return logits


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_gives_the_same_logits(case, tmp_path):
    model = make(case)
    ids = torch.randint(0, 300, (20,), generator=torch.Generator().manual_seed(3)).tolist()
    found = llama_cpp_logits(write_gguf(model, tmp_path / "model.gguf"), ids)
    expected = model(torch.tensor([ids])).logits[0]
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_llama_cpp_in_other_dtypes(dtype, tmp_path):
    model = make("dense" if dtype == "q8_0" else "grouped")  # whose widths are multiples of 32
    found = llama_cpp_logits(write_gguf(model, tmp_path / "model.gguf", dtype=dtype), list(range(9)))
    expected = model(torch.tensor([list(range(9))])).logits[0]
    assert (found - expected).abs().max() <= (0.01 if dtype == "float16" else 0.05) * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_the_file_says_what_each_layer_is(case, tmp_path):
    model = make(case)
    reader = gguf.GGUFReader(write_gguf(model, tmp_path / "model.gguf"))
    heads, groups, channels = (
        reader.fields[f"deci.{key}"].contents()
        for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    )
    assert channels == [layer.mlp.gate_proj.out_features for layer in model.model.layers]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for i, layer in enumerate(model.model.layers):
        assert heads[i] % groups[i] == 0 and heads[i] * 16 >= layer.self_attn.q_proj.out_features
        if len(set(queries_per_key_value_head(layer.self_attn))) == 1:
            assert heads[i] * 16 == layer.self_attn.q_proj.out_features
            assert groups[i] * 16 == layer.self_attn.k_proj.out_features
        assert tensors[f"blk.{i}.attn_q.weight"].data.shape == (heads[i] * 16, 64)
        assert tensors[f"blk.{i}.attn_k.weight"].data.shape == (groups[i] * 16, 64)
        assert np.array_equal(tensors[f"blk.{i}.ffn_down.weight"].data, layer.mlp.down_proj.weight.detach().numpy())
        for name, module in (("attn_output", layer.self_attn.o_proj), ("ffn_down", layer.mlp.down_proj)):
            assert (f"blk.{i}.{name}.bias" in tensors) == (module.bias is not None)
    assert ("output.weight" in tensors) == (not model.config.tie_word_embeddings)
    assert ("rope_freqs.weight" in tensors) == (case == "scaled rotation")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_eight_bits_are_within_half_a_step(tmp_path):
    model = make("dense")
    tensors = {one.name: one for one in gguf.GGUFReader(write_gguf(model, tmp_path / "m", dtype="q8_0")).tensors}
    for index, layer in enumerate(model.model.layers):
        found, weight = tensors[f"blk.{index}.ffn_down.weight"], layer.mlp.down_proj.weight.detach().numpy()
        steps = np.abs(weight.reshape(len(weight), -1, 32)).max(-1, keepdims=True) / 127
        off = np.abs(gguf.quants.dequantize(found.data, found.tensor_type) - weight).reshape(*steps.shape[:2], 32)
        assert (off <= 0.565 * steps).all()  # the scale in half precision adds up to 127 / 2^11 of a step


def test_the_embedded_tokenizer(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (make test-engines)")
    tokenizer = load_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, **sizes))
    path = write_gguf(model, tmp_path / "model.gguf", tokenizer)
    loaded = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in ("The old lighthouse keeper, aged 1234, isn't  here.\n\nÄrger <|im_start|>user\nHi<|im_end|>", " a b"):
        assert loaded.tokenize(text.encode(), add_bos=False, special=True) == tokenizer(text).input_ids
        assert loaded.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text).input_ids
    assert (loaded.token_eos(), loaded.metadata["tokenizer.chat_template"]) == (2, tokenizer.chat_template)


def test_bad_input(tmp_path):
    model, path = make("dense"), tmp_path / "model.gguf"
    with pytest.raises(ValueError, match=r"dtype is 'int4'.*allowed: float32, float16, bfloat16, q8_0"):
        write_gguf(model, path, dtype="int4")
    with pytest.raises(ValueError, match=r"attn_output\.weight has 80 columns; q8_0 takes multiples of 32"):
        write_gguf(make("multi-head"), path, dtype="q8_0")
    with pytest.raises(ValueError, match="the tokenizer gives tokens 0 to 49151, the model's vocabulary is 0 to 299"):
        write_gguf(model, path, load_tokenizer())
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match="rope_type 'dynamic'"):
        write_gguf(model, path)
    qwen = Qwen2ForCausalLM(Qwen2Config(vocab_size=9, hidden_size=32, intermediate_size=64, num_hidden_layers=1))
    with pytest.raises(ValueError, match="architecture 'qwen2'"):
        write_gguf(qwen, path)
    assert not list(tmp_path.iterdir())
