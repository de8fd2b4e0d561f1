"""What perplexity is measured on in a comparison, by name: "hamlet" is the held-out half of that corpus,
"wikipedia:calibration" the other one, and "generated" text that the dense model wrote.

The last two are for choosing among variants, before those that won meet the corpora that judge them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from slimllm_nb.comparison.protocol import GENERATED, Protocol, corpus_and_half
from slimllm_nb.corpora import TextSource
from slimllm_nb.evaluation import token_blocks
from slimllm_nb.generated import real_and_generated
from slimllm_nb.sources import load_texts

SEED = 1_000_000  # of generated text that is judged on: no calibration sample has it
BLOCKS = 64  # of it, where a protocol sets no number of tokens


def judged_blocks(
    protocol: Protocol,
    own: Mapping[str, TextSource],
    tokenizer: PreTrainedTokenizerBase,
    model: Callable[[], LlamaForCausalLM] | None = None,
    keep: Path | None = None,
) -> dict[str, torch.Tensor]:
    """Blocks of tokens by corpus. model: gives the dense one, for GENERATED alone; keep: a file for what it writes."""
    found, length = {}, protocol.block_length
    for name in protocol.judge_on:
        if name == GENERATED:
            number = protocol.max_tokens // length if protocol.max_tokens else BLOCKS
            found[name] = real_and_generated([], tokenizer, model, number, number, length, SEED, keep, progress=False)
        else:
            found[name] = token_blocks(load_texts(*corpus_and_half(name), own), tokenizer, length, protocol.max_tokens)
    return found
