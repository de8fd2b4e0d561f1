"""What a model is worth: perplexity (paper section 5.1)."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimllm_nb.checks import evaluation_mode, require_batch_size, require_ids, require_texts
from slimllm_nb.devices import in_batches
from slimllm_nb.progress import bar


def token_blocks(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    block_length: int = 128,
    max_tokens: int | None = None,
) -> Int[Tensor, "blocks block_length"]:
    """The texts joined by blank lines, tokenized once and cut into blocks; what is left over is dropped.

    max_tokens: keep as many blocks as fit into so many tokens, evenly spaced over the whole text, so that a few long
    documents at its beginning do not decide. Paper section 5.1 and the authors' code (which scores every block).
    Raises: ValueError when there is not one full block, and for a string in the place of a list.
    """
    if block_length < 2:
        raise ValueError(f"block_length is {block_length}; allowed: at least 2 (a token and the next one)")
    texts = require_texts(texts)
    # The whole corpus is one sequence on purpose; the tokenizer need not warn that it is longer than the model allows.
    ids = tokenizer("\n\n".join(texts), return_tensors="pt", verbose=False)["input_ids"][0]
    tokens = len(ids) if max_tokens is None else min(len(ids), max_tokens)
    if tokens < block_length:
        raise ValueError(f"the text gives {tokens} tokens; one block of {block_length} is needed: give a longer text")
    blocks = ids[: len(ids) - len(ids) % block_length].view(-1, block_length)
    wanted = tokens // block_length
    return blocks[torch.arange(wanted) * len(blocks) // wanted]


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    blocks: Int[Tensor, "blocks block_length"],
    batch_size: int = 8,
    progress: bool = True,
) -> float:
    """exp of the mean negative log-likelihood of tokens 2 to the last of every block, in float32, summed in float64.

    Dropout is off. Raises: ValueError when it is not finite, and for blocks that the model cannot read, that hold
    padding or are longer than its limit.
    """
    require_ids(model, blocks, "blocks")
    require_batch_size(batch_size)

    def scored(batch: Tensor) -> float:
        batch = batch.to(model.device)
        found = negative_log_likelihood(model(batch, use_cache=False).logits, batch)
        shown.update(len(batch))
        return found

    blocks, options = blocks.long(), {"desc": "perplexity", "unit": "block", "progress": progress}
    with evaluation_mode(model), bar(total=len(blocks), **options) as shown:
        total = sum(in_batches(scored, blocks, batch_size, "perplexity"))
    return perplexity_from_nll(total, blocks, "the model's mean negative log-likelihood")


def negative_log_likelihood(
    logits: Float[Tensor, "blocks block_length vocabulary"], blocks: Int[Tensor, "blocks block_length"]
) -> float:
    """Of tokens 2 to the last of every block, summed; in float32."""
    predicted = logits[:, :-1].float().flatten(0, 1)
    return nn.functional.cross_entropy(predicted, blocks[:, 1:].flatten(), reduction="sum").item()


def perplexity_from_nll(total: float, blocks: Int[Tensor, "blocks block_length"], what: str) -> float:
    """exp of the mean over these blocks' scored tokens. Raises: ValueError, which begins with `what`, when it is not
    finite."""
    mean = total / blocks[:, 1:].numel()
    if not math.isfinite(mean):
        raise ValueError(f"{what} is {mean}: its weights or logits are not finite")
    return math.exp(mean)
