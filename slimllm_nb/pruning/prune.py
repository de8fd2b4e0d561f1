"""SlimLLM as a whole, or another method made of parts: prune(model, input_ids, ...) (paper section 4).

Decoder layers are handled in order. Inside a layer the heads go first; the MLP is scored on the output of the pruned
attention, and the next layer on the output of the pruned layer: on the activations that the pruned model will have.
"""

import time

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlamaForCausalLM

from slimllm_nb import calibration
from slimllm_nb.methods import MethodLike, as_method
from slimllm_nb.progress import bar as progress_bar
from slimllm_nb.pruning.allocation import Allocator
from slimllm_nb.pruning.amount import Amount, check_input
from slimllm_nb.pruning.gradients import loss_gradients
from slimllm_nb.pruning.layer import LayerPruner, PrunedLayer
from slimllm_nb.pruning.planned import Planned
from slimllm_nb.pruning.quantities import gradient_names
from slimllm_nb.pruning.report import PruningReport
from slimllm_nb.pruning.rows import Context
from slimllm_nb.pruning.similarity import dense_pass
from slimllm_nb.pruning.slicing import assemble

LEADING = 2  # first layers whose outputs are kept while similarities are computed: pruning needs as much room later


@torch.no_grad()
def prune(
    model: LlamaForCausalLM,
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
    progress: bool = True,
) -> tuple[LlamaForCausalLM, PruningReport]:
    """Prune a LLaMA; returns a new, smaller model and a report. `model` is left as it is.

    pruning_ratio: mean ratio over the pruned layers, from 0 (an identical model) up to, not including, 1. Or
    target_parameters: the share of the parameters of `target_of` ("model" or "decoder") to be left, above 0 up to 1,
    met within 0.3 points: channels make up what whole heads leave (budget.plan_target).
    pruned_layers, alpha: see ratios.allocate.
    method: a name ("slimllm", "flap", ...) or what is to be changed of SlimLLM: {"recovery": "none"}, {"channel_score":
    my_function}; see methods.as_method and methods.QUANTITIES.
    similarity: layer_similarities(model, input_ids), when it is known already: saves one forward pass.
    seed: of parts that draw at random. batch_size: samples at a time. activation_bytes: an MLP's activations are kept
    up to this size, else computed again when they are needed; None: as much as the layer's weights, and 64 MiB in any
    case. Beside them and the model there are twice the tokens' hidden states and the statistics of one layer.

    Errors: ValueError naming the setting, the part or the layer: a setting out of range, a target out of reach, an
    unknown part or one that returns what it may not, an architecture that is not LLaMA's, samples longer than the
    model's limit, activations that are not finite.
    """
    start = time.perf_counter()
    method = as_method(method)
    check_input(model, input_ids, batch_size)
    amount = Amount(pruning_ratio, target_parameters, target_of, pruned_layers, alpha)
    amount.check(model)
    names = gradient_names(method)
    gradients = loss_gradients(model, input_ids, names, batch_size, progress) if names else None
    pruner = LayerPruner(method, batch_size, activation_bytes, seed, gradients)
    leaving = []  # LLaMA's first layers change their input most and are spared: then they need not be computed again
    if similarity is None and "similarity" in method.allocation.needs:
        similarity, leaving = dense_pass(model, input_ids, LEADING, batch_size, progress)
    allocator = Allocator(
        method.allocation,
        model,
        {"similarity": similarity, "pruned_layers": pruned_layers, "alpha": alpha},
        (lambda: _dense_scores(pruner, model, input_ids, progress)) if method.scores_dense_model else None,
    )
    planned = amount.planned(allocator, model, method)
    layers = _prune_layers(pruner, model, input_ids, planned, similarity, leaving, progress)
    pruned = assemble(model, [layer.tensors for layer in layers], [layer.overrides for layer in layers])
    reports, seconds = [layer.report for layer in layers], time.perf_counter() - start
    return pruned, amount.report(method, planned, model, pruned, reports, seconds)


def _begun(
    pruner: LayerPruner, model: LlamaForCausalLM, input_ids: Tensor, entering: list[Tensor] | None = None
) -> tuple[Tensor, Context]:
    """What enters the first layer, or these batches of what enters another, and the context of a batch of it."""
    batches = entering or [calibration.embed(model, batch) for batch in input_ids.split(pruner.batch_size)]
    return torch.cat(batches), calibration.layer_contexts(model)


def _dense_scores(
    pruner: LayerPruner, model: LlamaForCausalLM, input_ids: Tensor, progress: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Head scores and channel scores of every layer of the dense model."""
    hidden, context = _begun(pruner, model, input_ids)
    bar = progress_bar(model.model.layers, desc="dense scores", unit="layer", progress=progress)
    both = [pruner.scores(layer, hidden, context, index) for index, layer in enumerate(bar)]
    return [heads for heads, _ in both], [channels for _, channels in both]


def _prune_layers(
    pruner: LayerPruner,
    model: LlamaForCausalLM,
    input_ids: Tensor,
    planned: Planned,
    similarity: Tensor | None,
    leaving: list[list[Tensor]],
    progress: bool,
) -> list[PrunedLayer]:
    """Layer after layer, each on what comes out of the pruned ones before it. leaving: what leaves the first layers of
    the dense model, as far as it is known; forgotten afterwards."""
    done_with = min(planned.first, len(leaving))  # the first layers, where nothing goes and what leaves is known
    entering = leaving[done_with - 1] if done_with else None
    leaving.clear()
    hidden, context = _begun(pruner, model, input_ids, entering)
    del entering
    pruned, carried = [], 0.0
    bar = progress_bar(model.model.layers, desc="pruning", unit="layer", progress=progress)
    for index, layer in enumerate(bar):
        one = None if similarity is None else similarity[index].item()
        if index < done_with:
            done = pruner.spare(layer, None, context, one, index)
        else:
            done, carried = planned.prune(pruner, layer, hidden, context, carried, one, index)
        pruned.append(done)
    return pruned
