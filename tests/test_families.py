"""Mistral and Qwen2 as the LLaMA that computes the same: in memory, on disk and behind the one command."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from conftest import make_small_model
from slimllm_nb.disk import checkpoint_perplexity, prune_checkpoint
from slimllm_nb.export import to_even_groups, to_stock
from slimllm_nb.pruning import prune
from slimllm_nb.sources import as_llama, load_model
from slimllm_nb.sources.families import why_not_llama
from test_checkpoint import tokenizer  # noqa: F401  a fixture

SHAPE = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 4}
SHAPE |= {"num_attention_heads": 8, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": [3, 7]}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
LLAMA_3["original_max_position_embeddings"] = 32
AMOUNT = {"target_parameters": 0.8, "pruned_layers": 3, "alpha": 2.0, "progress": False}
CASES = {
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=None, head_dim=8)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "qwen2.5, tied": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, tie_word_embeddings=True, rms_norm_eps=1e-5)),
    "mistral, rope scaled": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=None, rope_parameters=LLAMA_3)),
}


@pytest.fixture(params=CASES)
def other(request):
    """A random model of another family, with biases that are not zero."""
    torch.manual_seed(0)
    kind, config = CASES[request.param]
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


@pytest.fixture
def input_ids(generator):
    return torch.randint(4, 101, (6, 12), generator=generator)


@torch.no_grad()
def test_the_llama_computes_the_same_and_shares_the_weights(other, input_ids):
    llama, expected = as_llama(other), other(input_ids).logits
    assert (llama(input_ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert llama.lm_head.weight.data_ptr() == other.lm_head.weight.data_ptr()
    assert as_llama(llama) is llama and llama.generation_config.eos_token_id == [3, 7]
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(llama.generate(input_ids, **greedy), other.generate(input_ids, **greedy))


@torch.no_grad()
def test_biases_go_with_their_heads(other, input_ids):
    llama = as_llama(other)
    pruned, report = prune(llama, input_ids, **AMOUNT, method={"recovery": "none"})
    for line, before, after in zip(report.layers, llama.model.layers, pruned.model.layers, strict=True):
        if (bias := before.self_attn.q_proj.bias) is not None:
            assert torch.equal(after.self_attn.q_proj.bias, bias.view(8, -1)[line.kept_heads].flatten())
    expected = pruned(input_ids).logits
    for exported in (to_stock(pruned), to_even_groups(pruned)):
        assert (exported(input_ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_from_disk_as_from_memory(other, input_ids, tokenizer, tmp_path):  # noqa: F811
    other.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    loaded = load_model(str(tmp_path / "dense"))
    assert loaded.config.model_type == "llama" and torch.equal(
        loaded(input_ids).logits, as_llama(other)(input_ids).logits
    )
    pruned, report = prune(loaded, input_ids, **AMOUNT)
    from_disk = prune_checkpoint(tmp_path / "dense", tmp_path / "pruned", input_ids, **AMOUNT)
    assert [line.kept_channels for line in from_disk.layers] == [line.kept_channels for line in report.layers]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", trust_remote_code=True).eval()
    assert torch.equal(reloaded(input_ids).logits, pruned(input_ids).logits)
    own = torch.nn.functional.cross_entropy(other(input_ids).logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    (perplexity,) = checkpoint_perplexity(tmp_path / "dense", {"ids": input_ids}, progress=False).values()
    assert perplexity == pytest.approx(own.exp().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MistralConfig().to_dict(), "model_type 'mistral' with a sliding window of 4096 tokens"),
        ({"model_type": "mistral", "max_position_embeddings": 4096}, None),
        (Qwen2Config(use_sliding_window=True).to_dict(), "model_type 'qwen2' with a sliding window of 4096 tokens"),
        ({"model_type": "qwen3"}, "model_type 'qwen3' (it normalises queries and keys)"),
        ({"model_type": "gemma2"}, "model_type 'gemma2' (it scales its embeddings and norms)"),
        ({"model_type": "phi3"}, "model_type 'phi3' (its projections are fused)"),
        ({"model_type": "mixtral"}, "model_type 'mixtral' (it is a mixture of experts)"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"model_type": "llama"}, None),
    ],
)
def test_what_is_refused_and_why(config, reason):
    assert why_not_llama(config) == reason


def test_a_model_in_memory_is_refused_with_its_reason():
    mistral = MistralForCausalLM(MistralConfig(**SHAPE))
    with pytest.raises(ValueError, match="a sliding window of 4096 tokens; allowed: 'llama'"):
        as_llama(mistral)
    assert as_llama(small := make_small_model(2)) is small
