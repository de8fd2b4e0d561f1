"""The stock copy of a pruned model: the same logits from code that knows nothing of pruning."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from conftest import make_small_model
from slimllm_nb.evaluation import count_parameters
from slimllm_nb.export import to_even_groups
from slimllm_nb.export.stock import _stock_heads, padding_cost, to_stock
from slimllm_nb.llama import queries_per_key_value_head
from slimllm_nb.pruning import prune


@pytest.fixture
def input_ids(generator):
    return torch.randint(0, 101, (6, 10), generator=generator)


def prune_small(model, input_ids, ratio=0.4, layers=3, alpha=2.0):
    return prune(model, input_ids, pruning_ratio=ratio, pruned_layers=layers, alpha=alpha, progress=False)[0]


@torch.no_grad()
@pytest.mark.parametrize("layers", [0, 3, 4])
@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_same_logits(small_model, input_ids, layers, ratio):
    pruned = prune_small(small_model, input_ids, ratio, layers)
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    stock = to_stock(pruned)
    assert type(stock) is LlamaForCausalLM and type(stock.config) is LlamaConfig
    expected = pruned(input_ids).logits
    assert (stock(input_ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert all(torch.equal(tensor, before[name]) for name, tensor in pruned.state_dict().items())
    assert not {p.data_ptr() for p in stock.parameters()} & {p.data_ptr() for p in pruned.parameters()}


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_even_groups_give_the_same_logits(small_model, input_ids, ratio):
    pruned = prune_small(small_model, input_ids, ratio)
    even, expected = to_even_groups(pruned), pruned(input_ids).logits
    assert (even(input_ids).logits - expected).abs().max() <= 1e-6 * expected.abs().max()
    for before, after in zip(pruned.model.layers, even.model.layers, strict=True):
        counts, made = (queries_per_key_value_head(one.self_attn) for one in (before, after))
        assert type(after.self_attn) is LlamaAttention and len(set(made)) == 1 and sum(made) == sum(counts)
        assert made == counts or len(set(counts)) > 1  # what is even stays as it is
    assert not {p.data_ptr() for p in even.parameters()} & {p.data_ptr() for p in pruned.parameters()}


@torch.no_grad()
def test_a_dense_model_is_copied(small_model, input_ids):
    stock = to_stock(small_model)
    assert count_parameters(stock) == count_parameters(small_model)
    assert torch.equal(stock(input_ids).logits, small_model(input_ids).logits)


@torch.no_grad()
def test_biases_tied_weights_and_scaled_rotation(input_ids):
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    model = make_small_model(
        4, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_parameters=scaled, rms_norm_eps=1e-3
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    pruned = prune_small(model, input_ids, layers=4)
    stock, expected = to_stock(pruned), pruned(input_ids).logits
    assert (stock(input_ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert stock.lm_head.weight.data_ptr() == stock.model.embed_tokens.weight.data_ptr()


@torch.no_grad()
def test_saved_and_loaded_without_remote_code(input_ids, tmp_path):
    pruned = prune_small(make_small_model(4), input_ids)
    to_stock(pruned).save_pretrained(tmp_path)
    assert not (tmp_path / "modeling.py").exists()
    reloaded, expected = AutoModelForCausalLM.from_pretrained(tmp_path), pruned(input_ids).logits
    assert type(reloaded) is LlamaForCausalLM
    assert (reloaded(input_ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(reloaded.generate(input_ids, **greedy), pruned.generate(input_ids, **greedy))


@torch.no_grad()
def test_the_dtype_is_kept(input_ids):
    pruned = prune_small(make_small_model(4), input_ids).bfloat16()
    stock, expected = to_stock(pruned), pruned(input_ids).logits
    assert stock.dtype == torch.bfloat16
    assert (stock(input_ids).logits - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("groups", "hidden_size", "expected"),
    [
        ([[1] * 7, [1] * 5], 48, (8, 8)),  # 7 heads do not divide 48
        ([[1] * 11], 44, (11, 11)),
        ([[3, 3, 3], [1, 2, 3]], 576, (9, 3)),
        ([[1, 2, 1, 1]], 48, (6, 6)),  # the group of two is written down as two groups of one
        ([[2, 2, 2, 2], [1, 2, 1, 1]], 48, (8, 4)),
        ([[4, 1]], 48, (6, 3)),
    ],
)
def test_head_counts(groups, hidden_size, expected):
    assert _stock_heads(groups, hidden_size) == expected


def test_what_padding_costs(input_ids):
    model = make_small_model(8)
    narrow = prune_small(model, input_ids, ratio=0.5, layers=4, alpha=0.0)
    assert to_stock(narrow).config.num_attention_heads == 4
    text = padding_cost(narrow, to_stock(narrow))
    assert text.startswith("padded to 4 heads, 4 key/value heads and 40 channels in every layer: ")
    # One layer left dense: the stock copy is as large as the dense model, and has biases on top.
    pruned = prune_small(model, input_ids, layers=3)
    stock, per_layer = to_stock(pruned), 3 * 32 + 48 + 2 * 80 + 48
    assert count_parameters(stock)["model"] == count_parameters(model)["model"] + 4 * per_layer
    assert f"{count_parameters(stock)['model']:,} parameters (+" in padding_cost(pruned, stock)


def test_another_architecture():
    config = Qwen2Config(vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    with pytest.raises(ValueError, match="architecture 'qwen2'"):
        to_stock(Qwen2ForCausalLM(config))


@torch.no_grad()
@pytest.mark.parametrize("key_value_heads", [8, 2])
@pytest.mark.parametrize("method", ["obs_ridge", "wanda_sp", "flap"])
def test_whatever_the_method(method, key_value_heads, input_ids, tmp_path):
    """Saved, loaded and made stock: weights that a recovery fitted anew, with and without bias."""
    model = make_small_model(key_value_heads, hidden_size=64, intermediate_size=300, head_dim=16)
    settings = {"target_parameters": 0.7, "target_of": "decoder", "pruned_layers": 4, "alpha": 1.0, "progress": False}
    pruned, _ = prune(model, input_ids, **settings, method=method)
    expected = pruned(input_ids).logits
    pruned.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(input_ids).logits, expected)
    assert (to_stock(loaded)(input_ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
