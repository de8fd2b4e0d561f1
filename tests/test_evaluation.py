"""Perplexity against transformers' own loss; blocks; parameters counted by hand."""

import math

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from conftest import make_small_model
from slimllm_nb.evaluation import count_parameters, perplexity, token_blocks


@pytest.fixture(scope="module")
def characters():
    """A tokenizer with one token per character: its code."""
    tokenizer = Tokenizer(WordLevel({chr(code): code for code in range(128)}))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_blocks_of_the_joined_texts(characters):
    blocks = token_blocks(["abcd", "efg", "h"], characters, block_length=4)
    assert ["".join(map(chr, block)) for block in blocks.tolist()] == ["abcd", "\n\nef", "g\n\nh"]


def test_what_does_not_fill_a_block_is_dropped(characters):
    assert token_blocks(["abcdefghijk"], characters, block_length=4).tolist() == [
        [97, 98, 99, 100],
        [101, 102, 103, 104],
    ]


def test_fewer_blocks_are_spread_over_the_text(characters):
    letters = ["abcdefghijklmnopqrstuvwx"]
    blocks = token_blocks(letters, characters, block_length=2, max_tokens=9)
    assert ["".join(map(chr, block)) for block in blocks.tolist()] == ["ab", "gh", "mn", "st"]
    assert len(token_blocks(letters, characters, block_length=2, max_tokens=1000)) == 12


@pytest.mark.parametrize(
    ("length", "most", "message"),
    [
        (128, None, "the text gives 5 tokens; one block of 128 is needed: give a longer text"),
        (4, 3, "the text gives 3 tokens"),
        (1, None, "block_length is 1; allowed: at least 2"),
    ],
)
def test_a_text_shorter_than_a_block_is_refused(characters, length, most, message):
    with pytest.raises(ValueError, match=message):
        token_blocks(["short"], characters, length, most)


@torch.no_grad()
def test_perplexity_is_the_exponential_of_transformers_own_loss(small_model, generator):
    blocks = torch.randint(0, 101, (7, 12), generator=generator)
    losses = [small_model(block[None], labels=block[None]).loss.item() for block in blocks]
    expected = math.exp(sum(losses) / len(losses))
    assert perplexity(small_model, blocks, batch_size=3, progress=False) == pytest.approx(expected, rel=1e-5)
    # Blocks are independent of each other: their order and the batches do not matter.
    assert perplexity(small_model, blocks.flip(0), batch_size=7, progress=False) == pytest.approx(expected, rel=1e-5)


def test_a_model_that_knows_nothing_has_the_size_of_its_vocabulary_as_perplexity(generator):
    model = make_small_model(4)
    model.lm_head.weight.data.zero_()
    blocks = torch.randint(0, 101, (2, 5), generator=generator)
    assert perplexity(model, blocks, progress=False) == pytest.approx(101, rel=1e-5)


def test_perplexity_of_broken_weights_is_refused(generator):
    model = make_small_model(4)
    model.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match="mean negative log-likelihood is nan"):
        perplexity(model, torch.randint(0, 101, (2, 5), generator=generator), progress=False)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_counted_by_hand(tied):
    model = make_small_model(2, tie_word_embeddings=tied)
    attention = 2 * 48 * 32 + 2 * 48 * 8  # q and o with 8 heads of 4; k and v with 2 heads of 4
    decoder = 4 * (attention + 3 * 48 * 80 + 2 * 48)
    outside = 101 * 48 * (1 if tied else 2) + 48
    assert count_parameters(model) == {"decoder": decoder, "model": decoder + outside}


def test_blocks_longer_than_the_models_limit():
    model = make_small_model(4, max_position_embeddings=9)
    assert perplexity(model, torch.zeros(1, 9, dtype=torch.long), progress=False) > 1
    with pytest.raises(ValueError, match="a sample of blocks has 10 tokens; the model's limit is 9"):
        perplexity(model, torch.zeros(1, 10, dtype=torch.long), progress=False)
