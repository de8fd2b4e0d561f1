"""prune_checkpoint(source, target, input_ids, ...): prune() for a model that need not fit in memory.

Embedding and head stay on disk; a decoder layer is read, pruned and written before the next one is read. In memory are
one layer, its statistics and the tokens' hidden states, whatever the number of layers.
"""

import dataclasses
import time
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slimllm_nb.disk.resume import Work, made_from, require_room
from slimllm_nb.disk.stored import StoredModel
from slimllm_nb.disk.walk import Walker, similarity_step
from slimllm_nb.export.checkpoint import require_free, save_checkpoint
from slimllm_nb.llama import require_fitting
from slimllm_nb.methods import MethodLike, as_method
from slimllm_nb.pruning.allocation import Allocator
from slimllm_nb.pruning.amount import Amount, check_input
from slimllm_nb.pruning.layer import LayerPruner
from slimllm_nb.pruning.quantities import gradient_names
from slimllm_nb.pruning.report import LayerReport, PruningReport
from slimllm_nb.pruning.slicing import assemble
from slimllm_nb.sources import load_tokenizer
from slimllm_nb.sources.models import find_device


@torch.no_grad()
def prune_checkpoint(
    source: str | Path,
    target: str | Path,
    input_ids: Int[Tensor, "samples length"],
    *,
    pruning_ratio: float | None = None,
    target_parameters: float | None = None,
    target_of: str = "model",
    pruned_layers: int,
    alpha: float,
    method: MethodLike = "slimllm",
    similarity: Float[Tensor, "layers"] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    activation_bytes: int | None = None,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    base_model: str | None = None,
    licence: str | None = None,
    max_shard_size: str = "2GB",
    progress: bool = True,
) -> PruningReport:
    """Prune the LLaMA in the folder `source` and write a checkpoint into `target`; returns the report.

    Settings as in prune(), which keeps the same heads and channels. dtype: what is computed with and written ("auto":
    the checkpoint's own). device: "cpu", "cuda", or "auto". base_model, licence, max_shard_size: as in save_checkpoint.

    What is cut off goes on at the layer where it was, when it is called again with the same settings: finished layers
    stand in `.<target>.work` beside the target until the checkpoint is whole. Out of memory on an accelerator halves
    the batch from there on, with a warning.
    Errors: those of prune(); SourceError for a folder that holds no LLaMA in safetensors; FileExistsError for a target
    that holds something else than a checkpoint; ValueError for a method that needs gradients of the whole model, and
    for a disk without room. All before the first layer is computed.
    """
    start, target = time.perf_counter(), Path(target).absolute()
    require_free(target)
    method = as_method(method)
    if gradient_names(method):
        raise ValueError(f"method {method.name} asks for gradients, which need the whole model in memory: use prune()")
    stored = StoredModel(source, dtype, find_device(device))
    model = stored.skeleton
    check_input(model, input_ids, batch_size)
    amount = Amount(pruning_ratio, target_parameters, target_of, pruned_layers, alpha)
    amount.check(model)
    tokenizer = load_tokenizer(str(source))
    require_fitting(model, tokenizer)
    place = target.with_name(f".{target.name}.work")
    require_room(place, 2 * stored.size)
    work = Work(
        place,
        made_from(
            stored,
            method,
            input_ids=input_ids,
            similarity=similarity,
            amount=dataclasses.astuple(amount),
            others=[seed, batch_size, activation_bytes],
        ),
    )
    walker = Walker(stored, work, input_ids, batch_size, progress)

    def pruner(batch_size: int) -> LayerPruner:
        return LayerPruner(method, batch_size, activation_bytes, seed)

    if similarity is None and "similarity" in method.allocation.needs:
        walker("similarity", similarity_step)
        values = [work.value("similarity", index) for index in range(stored.num_layers)]
        similarity = torch.tensor(values, dtype=torch.float64)

    def dense_scores() -> tuple[list[Tensor], list[Tensor]]:
        def step(layer, hidden, context, index, batch_size):
            heads, channels = pruner(batch_size).scores(layer, hidden, context, index)
            return None, {"heads": heads, "channels": channels}

        walker("dense scores", step)
        found = [work.tensors("dense scores", index) for index in range(stored.num_layers)]
        return [one["heads"] for one in found], [one["channels"] for one in found]

    known = {"similarity": similarity, "pruned_layers": pruned_layers, "alpha": alpha}
    allocator = Allocator(method.allocation, model, known, dense_scores if method.scores_dense_model else None)
    planned = amount.planned(allocator, model, method)

    def prune_step(layer, hidden, context, index, batch_size):
        carried = work.value("pruning", index - 1)["carried"] if index else 0.0
        one = None if similarity is None else similarity[index].item()
        done, carried = planned.prune(pruner(batch_size), layer, hidden, context, carried, one, index)
        return {"report": done.report.model_dump(), "overrides": done.overrides, "carried": carried}, done.tensors

    walker("pruning", prune_step)
    done = [work.value("pruning", index) for index in range(stored.num_layers)]
    tensors = [work.tensors("pruning", index) for index in range(stored.num_layers)]
    stored.convert()
    pruned = assemble(model, tensors, [one["overrides"] for one in done])
    reports = [LayerReport.model_validate(one["report"]) for one in done]
    report = amount.report(method, planned, model, pruned, reports, time.perf_counter() - start)
    base = base_model or str(source)
    options = {"base_model": base, "licence": licence, "max_shard_size": max_shard_size}
    save_checkpoint(pruned, tokenizer, target, report=report, **options)
    work.remove()
    return report
