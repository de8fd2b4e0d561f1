"""Perplexity of a checkpoint that need not fit in memory, one decoder layer at a time."""

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slimllm_nb import calibration
from slimllm_nb.disk.stored import StoredModel
from slimllm_nb.evaluation.perplexity import negative_log_likelihood, of_sum
from slimllm_nb.llama import require_length
from slimllm_nb.progress import bar as progress_bar
from slimllm_nb.sources.models import find_device

HIDDEN_BYTES = 1 << 30  # hidden states that wait in memory; more blocks take the layers from disk once more


@torch.no_grad()
def checkpoint_perplexity(
    folder: str | Path,
    blocks: Mapping[str, Int[Tensor, "blocks block_length"]],
    *,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, float]:
    """evaluation.perplexity of the model in `folder`, dense or pruned, on every corpus.

    In memory are one layer, or the output head, and at most 1 GiB of hidden states. dtype, device: as in
    prune_checkpoint. Errors: SourceError for a folder that holds no LLaMA in safetensors; ValueError for blocks that
    are longer than the model's limit, and for a perplexity that is not finite.
    """
    stored = StoredModel(folder, dtype, find_device(device))
    for corpus, ids in blocks.items():
        require_length(stored.skeleton, ids.shape[1], f"a block of {corpus}")
    head = [module.to(stored.device, stored.dtype) for module in (stored.skeleton.model.norm, stored.skeleton.lm_head)]
    found, token_bytes = {}, stored.dtype.itemsize * stored.skeleton.config.hidden_size
    for corpus, ids in blocks.items():
        some = max(batch_size, HIDDEN_BYTES // (token_bytes * ids.shape[1]))
        total = sum(
            _negative_log_likelihood(stored, head, part, batch_size, f"{corpus}, layer", progress)
            for part in ids.split(some)
        )
        found[corpus] = of_sum(total, ids, f"{folder}: the mean negative log-likelihood on {corpus}")
    return found


def _negative_log_likelihood(
    stored: StoredModel,
    head: list[nn.Module],
    ids: Int[Tensor, "blocks length"],
    batch_size: int,
    what: str,
    progress: bool,
) -> float:
    """Summed over all blocks and their tokens 2 to the last."""
    context = calibration.layer_contexts(stored.skeleton)
    # They wait on the CPU: an accelerator holds a batch alone.
    hidden: Float[Tensor, "blocks length hidden"] = stored.embed(ids).cpu()
    for index in progress_bar(range(stored.num_layers), desc=what, progress=progress):
        layer = stored.layer(index)
        for batch in hidden.split(batch_size):
            there = batch.to(stored.device)
            batch.copy_(layer(there, **context(there)))
    norm, output = head
    total = 0.0
    for batch, asked in zip(hidden.split(batch_size), ids.split(batch_size), strict=True):
        total += negative_log_likelihood(output(norm(batch.to(stored.device))), asked.to(stored.device))
    return total
