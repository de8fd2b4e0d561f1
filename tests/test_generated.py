"""Calibration samples that the model writes itself."""

import math
from types import SimpleNamespace

import pytest
import torch

from conftest import make_small_model
from hub_folder import make_tokenizer
from slimllm_nb import calibration
from slimllm_nb.corpora import TextSource
from slimllm_nb.generated import document_separator, generate_samples, main, real_and_generated, windows
from slimllm_nb.sources import load_model, load_texts, load_tokenizer

SIZES = {"num_samples": 5, "length": 6, "batch_size": 2, "progress": False}


def tokenizer_of(vocabulary=(), bos=None, eos=None):
    return SimpleNamespace(
        get_vocab=lambda: {token: 7 + i for i, token in enumerate(vocabulary)}, bos_token_id=bos, eos_token_id=eos
    )


def test_drawn_from_the_models_own_distribution():
    """Against the probabilities of a model whose next token hangs on the last one alone, and without ends of texts."""
    model = make_small_model(8, vocab_size=12, num_hidden_layers=1)
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()  # no token sees another
    model.generation_config.eos_token_id = [3, 4]
    model.generation_config.temperature, model.generation_config.top_k = 0.1, 2  # a chat's, not the model's
    model.lm_head.weight.data *= 3
    found = generate_samples(model, tokenizer_of(bos=0, eos=5), 400, 40, seed=1, batch_size=400, progress=False)
    counts = torch.zeros(12, 12).index_put_((found[:, :-1].flatten(), found[:, 1:].flatten()), torch.ones(1), True)
    with torch.no_grad():
        logits = model(torch.arange(12)[:, None]).logits[:, 0]
    logits[:, [0, 3, 4, 5]] = -math.inf
    expected, total = logits.softmax(-1), counts.sum(1, keepdim=True)
    assert set(found.unique().tolist()) <= {1, 2, 6, 7, 8, 9, 10, 11}
    seen = total[:, 0] > 500
    deviation = (expected * (1 - expected) * total).sqrt()
    assert seen.sum() >= 4 and ((counts - expected * total).abs() <= 5 * deviation + 1)[seen].all()


def test_a_seed_gives_the_same_and_disturbs_nobody():
    model, tokenizer = make_small_model(2).train(), tokenizer_of(bos=1)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = generate_samples(model, tokenizer, **SIZES, seed=0)
    assert torch.equal(torch.rand(4), expected) and model.training
    assert first.shape == (5, 6) and torch.equal(first, generate_samples(model, tokenizer, **SIZES, seed=0))
    assert not torch.equal(first, generate_samples(model, tokenizer, **SIZES, seed=1))


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (tokenizer_of(["<|im_start|>", "<|endoftext|>"], bos=1, eos=2), 8),
        (tokenizer_of(["<s>"], bos=1, eos=2), 1),
        (tokenizer_of(eos=2), 2),
    ],
)
def test_texts_begin_where_documents_meet(tokenizer, expected):
    assert document_separator(tokenizer) == expected


def test_real_samples_come_first_and_generated_ones_are_kept(tmp_path):
    model, tokenizer, asked = make_small_model(2, vocab_size=1000), make_tokenizer(), []
    texts = ["The government said on Monday that it would go on. " * 20] * 3

    def given():
        asked.append(model)
        return model

    keep = tmp_path / "kept.safetensors"
    found = real_and_generated(texts, tokenizer, given, 6, 2, 8, 0, keep, progress=False)
    assert torch.equal(found[:4], windows(texts, tokenizer, 4, 8, 0))
    assert torch.equal(found[4:], generate_samples(model, tokenizer, 2, 8, 0, progress=False))
    assert torch.equal(found, real_and_generated(texts, tokenizer, given, 6, 2, 8, 0, keep)) and len(asked) == 1
    assert real_and_generated([], tokenizer, given, 2, 2, 8, 0, progress=False).shape == (2, 8)  # without any text
    assert torch.equal(real_and_generated(texts, tokenizer, None, 4, 0, 8, 0), found[:4])


def test_what_is_refused():
    with pytest.raises(ValueError, match="generated is 5; allowed: 0 to 4, the number of samples"):
        real_and_generated([], tokenizer_of(bos=1), None, 4, 5, 8, 0)
    with pytest.raises(ValueError, match="num_samples is 0 and length 6"):
        generate_samples(make_small_model(2), tokenizer_of(bos=1), 0, 6)
    with pytest.raises(ValueError, match="no token that begins or ends a text"):
        generate_samples(make_small_model(2), tokenizer_of(), 2, 6)


def test_the_models_own_text_as_a_corpus(tmp_path, capsys):
    tokenizer = make_tokenizer()
    make_small_model(4, vocab_size=1000).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    given, path = [str(tmp_path / "model"), str(tmp_path / "own.jsonl")], tmp_path / "own.jsonl"
    assert main([*given, "--documents", "3", "--length", "24", "--device", "cpu"]) == 0
    texts = load_texts("own", "calibration", {"own": TextSource(files=[str(path)])})
    drawn = generate_samples(load_model(given[0]), load_tokenizer(given[0]), 3, 24, progress=False)
    assert [text.split() for text in texts] == [text.split() for text in tokenizer.batch_decode(drawn)]
    assert calibration.draw_samples(texts, tokenizer, num_samples=2, length=8).shape == (2, 8)
    for name, message in (("own.txt", "ends in .jsonl"), ("own.jsonl", "own.jsonl is there already; allowed")):
        assert main([given[0], str(tmp_path / name)]) == 2 and message in capsys.readouterr().err
