"""SlimLLM as a whole, or another method made of parts: prune(model, input_ids, ...) (paper section 4).

Decoder layers are handled in order. Inside a layer the heads go first; the MLP is scored on the output of the pruned
attention, and the next layer on the output of the pruned layer: on the activations that the pruned model will have.
"""

import time
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlamaForCausalLM

from slimllm_nb import calibration, ratios
from slimllm_nb.evaluation import count_parameters
from slimllm_nb.llama import require_length, require_llama
from slimllm_nb.methods import Method, MethodLike, as_method
from slimllm_nb.progress import bar as progress_bar
from slimllm_nb.pruning.allocation import Allocator
from slimllm_nb.pruning.budget import check_met, check_target, plan_target
from slimllm_nb.pruning.gradients import loss_gradients
from slimllm_nb.pruning.layer import LayerPruner, PrunedLayer, parameters
from slimllm_nb.pruning.quantities import ChannelQuantities, HeadQuantities, require_finite
from slimllm_nb.pruning.report import PartReport, PruningReport
from slimllm_nb.pruning.slicing import assemble


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
    activation_bytes: int = 2 << 30,
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
    seed: of parts that draw at random. batch_size: samples at a time. activation_bytes: a layer's activations are kept
    up to this size.

    Errors: ValueError naming the setting, the part or the layer: a setting out of range, a target out of reach, an
    unknown part or one that returns what it may not, an architecture that is not LLaMA's, samples longer than the
    model's limit, activations that are not finite.
    """
    start = time.perf_counter()
    method = as_method(method)
    _check(model, input_ids, pruning_ratio, target_parameters, target_of, batch_size)
    ratios.allocate(torch.zeros(len(model.model.layers)), pruning_ratio or 0.0, pruned_layers, alpha)  # checks them
    gradients = _gradients(method, model, input_ids, batch_size, progress)
    pruner = LayerPruner(method, batch_size, activation_bytes, seed, gradients)
    if similarity is None and "similarity" in method.allocation.needs:
        similarity = layer_similarities(model, input_ids, batch_size=batch_size, progress=progress)
    allocator = Allocator(
        method.allocation,
        model,
        {"similarity": similarity, "pruned_layers": pruned_layers, "alpha": alpha},
        (lambda: _dense_scores(pruner, model, input_ids, progress)) if method.scores_dense_model else None,
    )
    removals = None
    if target_parameters is not None:
        plan = plan_target(allocator, model, target_parameters, target_of, shift=method.recovery.adds_bias)
        pruning_ratio, removals = plan.pruning_ratio, plan.removals
    layers = _prune_layers(pruner, model, input_ids, allocator(pruning_ratio), removals, similarity, progress)
    pruned = assemble(model, [layer.tensors for layer in layers], [layer.overrides for layer in layers])
    before, after = count_parameters(model), count_parameters(pruned)
    if target_parameters is not None:
        check_met(target_parameters, target_of, after[target_of] / before[target_of])
    report = PruningReport(
        method=method.name,
        pruning_ratio=pruning_ratio,
        pruned_layers=pruned_layers,
        alpha=alpha,
        target_parameters=target_parameters,
        target_of=None if target_parameters is None else target_of,
        model=PartReport(before=before["model"], after=after["model"]),
        decoder=PartReport(before=before["decoder"], after=after["decoder"]),
        layers=[layer.report for layer in layers],
        seconds=time.perf_counter() - start,
    )
    return pruned, report


@torch.no_grad()
def layer_similarities(
    model: LlamaForCausalLM, input_ids: Int[Tensor, "samples length"], *, batch_size: int = 8, progress: bool = True
) -> Float[Tensor, "layers"]:
    """ratios.layer_similarity of every decoder layer of the dense model: one forward pass. Float64, on the CPU.

    Errors: ValueError naming the first layer whose activations are not finite.
    """
    totals = torch.zeros(len(model.model.layers), dtype=torch.float64)
    with progress_bar(total=len(input_ids), desc="layer similarity", unit="sample", progress=progress) as bar:
        for batch in input_ids.split(batch_size):
            hidden = calibration.embed(model, batch)
            context = calibration.layer_context(model, hidden)
            for index, layer in enumerate(model.model.layers):
                output = layer(hidden, **context)
                similarity = ratios.layer_similarity(hidden.flatten(0, 1), output.flatten(0, 1))
                require_finite(similarity, f"decoder layer {index}")
                totals[index] += similarity.cpu() * len(batch)  # every sample has the same number of tokens
                hidden = output
            bar.update(len(batch))
    return totals / len(input_ids)


def _gradients(method: Method, model, input_ids: Tensor, batch_size: int, progress: bool) -> list | None:
    """What the method's parts ask for; None: nothing."""
    heads, channels = method.head_parts, method.channel_parts
    if method.scores_dense_model:
        heads, channels = [*heads, method.head_score], [*channels, method.channel_score]
    names = HeadQuantities.gradient_names(heads) + ChannelQuantities.gradient_names(channels)
    return loss_gradients(model, input_ids, names, batch_size, progress) if names else None


def _walk(pruner: LayerPruner, model: LlamaForCausalLM, input_ids: Tensor) -> tuple[Tensor, Callable[[Tensor], dict]]:
    """What enters the first layer, and the context of a batch of it."""
    hidden = torch.cat([calibration.embed(model, batch) for batch in input_ids.split(pruner.batch_size)])
    contexts: dict[int, dict] = {}  # the same for every layer; the last batch may be smaller

    def context(batch: Tensor) -> dict:
        if len(batch) not in contexts:
            contexts[len(batch)] = calibration.layer_context(model, batch)
        return contexts[len(batch)]

    return hidden, context


def _dense_scores(
    pruner: LayerPruner, model: LlamaForCausalLM, input_ids: Tensor, progress: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Head scores and channel scores of every layer of the dense model."""
    hidden, context = _walk(pruner, model, input_ids)
    bar = progress_bar(model.model.layers, desc="dense scores", unit="layer", progress=progress)
    both = [pruner.scores(layer, hidden, context, index) for index, layer in enumerate(bar)]
    return [heads for heads, _ in both], [channels for _, channels in both]


def _prune_layers(
    pruner: LayerPruner,
    model: LlamaForCausalLM,
    input_ids: Tensor,
    layer_ratios: Float[Tensor, "layers 2"],
    removals: list[float] | None,
    similarity: Tensor | None,
    progress: bool,
) -> list[PrunedLayer]:
    """Layer after layer, each on what comes out of the pruned ones before it.

    removals: parameters that each layer is to lose; what one could not give, or gave too much, the next one settles.
    """
    hidden, context = _walk(pruner, model, input_ids)
    pruned, carried = [], 0.0
    bar = progress_bar(model.model.layers, desc="pruning", unit="layer", progress=progress)
    for index, (layer, shares) in enumerate(zip(bar, layer_ratios.tolist(), strict=True)):
        removal = None if removals is None or not any(shares) else removals[index] + carried
        known = None if similarity is None else similarity[index].item()
        done = pruner(layer, hidden, context, tuple(shares), removal, known, index)
        if removal is not None:
            carried = removal - (parameters(layer.state_dict()) - parameters(done.tensors))
        pruned.append(done)
    return pruned


def _check(model, input_ids, pruning_ratio, target_parameters, target_of, batch_size) -> None:
    """All settings, before the first forward pass."""
    require_llama(model)
    if (pruning_ratio is None) == (target_parameters is None):
        raise ValueError(
            f"pruning_ratio is {pruning_ratio} and target_parameters is {target_parameters}: give exactly one of them"
        )
    if target_parameters is not None:
        check_target(target_parameters, target_of)
    if input_ids.ndim != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids is {input_ids.dtype} of shape {tuple(input_ids.shape)}; allowed: integers, (samples, length)"
        )
    if input_ids.min() < 0 or input_ids.max() >= model.config.vocab_size:
        raise ValueError(
            f"input_ids holds tokens {input_ids.min()} to {input_ids.max()}; allowed: 0 to "
            f"{model.config.vocab_size - 1}: the tokenizer does not fit the model"
        )
    require_length(model, input_ids.shape[1], "a calibration sample")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; allowed: at least 1")
