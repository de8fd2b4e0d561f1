"""Samples and the walk through the decoder, against transformers' own forward pass."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from slimllm_nb import calibration
from slimllm_nb.calibration import draw_samples
from slimllm_nb.generated import windows


@pytest.fixture(scope="module")
def numbers():
    """A tokenizer of numbers: "7 8 9" -> [7, 8, 9]."""
    tokenizer = Tokenizer(WordLevel({str(number): number for number in range(1300)}))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def text(start, length):
    return " ".join(map(str, range(start, start + length)))


TEXTS = [text(100 * i, 5 + i) for i in range(1, 13)]  # documents of 6 to 17 tokens; document i starts at 100 i


def test_samples_are_windows_of_different_long_documents(numbers):
    samples = draw_samples(TEXTS, numbers, num_samples=8, length=10, seed=0)
    assert samples.shape == (8, 10)
    documents = (samples[:, 0] // 100).tolist()
    assert len(set(documents)) == 8 and min(documents) >= 5  # documents 1 to 4 have fewer than 10 tokens
    for sample, document in zip(samples.tolist(), documents, strict=True):
        assert sample == list(range(sample[0], sample[0] + 10))
        assert sample[-1] < 100 * document + 5 + document


def test_samples_follow_the_seed(numbers):
    first = draw_samples(TEXTS, numbers, num_samples=5, length=8, seed=3)
    assert torch.equal(first, draw_samples(TEXTS, numbers, num_samples=5, length=8, seed=3))
    assert not torch.equal(first, draw_samples(TEXTS, numbers, num_samples=5, length=8, seed=4))


def test_every_window_of_a_document_is_drawn(numbers):
    starts = {draw_samples([text(0, 7)], numbers, 1, 5, seed)[0, 0].item() for seed in range(60)}
    assert starts == {0, 1, 2}


def test_windows_do_not_overlap_and_cover_all_documents(numbers):
    pieces = windows(TEXTS, numbers, num_samples=23, length=5)
    assert sorted(pieces[:, 0].tolist()) == [100 * i + 5 * k for i in range(1, 13) for k in range((5 + i) // 5)]


@pytest.mark.parametrize(
    ("draw", "count", "length", "message"),
    [
        (draw_samples, 9, 10, r"9 samples of 10 tokens .* only 8 of 12 texts .* longest has 17"),
        (draw_samples, 1, 18, r"only 0 of 12 texts have that many tokens \(the longest has 17\)"),
        (windows, 24, 5, r"24 samples of 5 tokens .* the 12 texts hold 23 windows"),
        (draw_samples, 0, 10, "num_samples is 0"),
        (windows, 3, 1, "length 1"),
    ],
)
def test_too_short_texts_are_refused(numbers, draw, count, length, message):
    with pytest.raises(ValueError, match=message):
        draw(TEXTS, numbers, count, length)


@torch.no_grad()
def test_walking_the_decoder_is_the_models_own_forward(small_model, generator):
    input_ids = torch.randint(0, 101, (3, 9), generator=generator)
    expected = small_model(input_ids, output_hidden_states=True).hidden_states
    hidden = calibration.embed(small_model, input_ids)
    context = calibration.layer_context(small_model, hidden)
    for layer, before in zip(small_model.model.layers, expected, strict=False):
        assert torch.equal(hidden, before)
        hidden = layer(hidden, **context)
    assert torch.equal(small_model.model.norm(hidden), expected[-1])


@torch.no_grad()
def test_what_enters_the_projections_is_what_hooks_see(small_model, generator):
    input_ids = torch.randint(0, 101, (3, 9), generator=generator)
    layer, seen = small_model.model.layers[1], {}
    for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        layer.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    hidden = small_model(input_ids, output_hidden_states=True).hidden_states[1]
    before = dict(layer.state_dict())
    context = calibration.layer_context(small_model, hidden)
    heads = calibration.head_inputs(layer, hidden, context)
    after_attention = hidden + layer.self_attn(layer.input_layernorm(hidden), **context)[0]
    inputs = calibration.mlp_inputs(layer, after_attention)
    activations = calibration.mlp_activations(layer, inputs)
    assert heads.shape == (27, 8, 4)
    assert torch.equal(heads, seen["self_attn.o_proj"].reshape(27, 8, 4))
    torch.testing.assert_close(inputs, seen["mlp.gate_proj"].reshape(27, 48))
    torch.testing.assert_close(activations, seen["mlp.down_proj"].reshape(27, 80))
    assert layer.state_dict().keys() == before.keys()  # the layer itself still has its projections
    some = torch.tensor([0, 3, activations.shape[1] - 1])
    torch.testing.assert_close(calibration.mlp_activations(layer, inputs, some), activations[:, some])
    assert torch.equal(calibration.mlp_activations(layer, inputs), activations)  # the layer is as it was
