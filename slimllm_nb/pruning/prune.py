"""SlimLLM as a whole: prune(model, input_ids, ...) (paper section 4).

Decoder layers are handled in order. Inside a layer the heads go first; the MLP is scored on the output of the pruned
attention, and the next layer on the output of the pruned layer: on the activations that the pruned model will have.
"""

import time

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlamaForCausalLM

from slimllm_nb import calibration, channels, ratios
from slimllm_nb.evaluation import count_parameters
from slimllm_nb.llama import require_length, require_llama
from slimllm_nb.progress import bar as progress_bar
from slimllm_nb.pruning.budget import check_met, check_target, plan_target
from slimllm_nb.pruning.layer import ChannelScore, HeadScore, LayerPruner, PrunedLayer, parameters
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
    greedy: bool = True,
    keep_lowest: float = 0.01,
    recover: bool = True,
    head_score: HeadScore | None = None,
    channel_score: ChannelScore | None = None,
    similarity: Float[Tensor, "layers"] | None = None,
    batch_size: int = 8,
    activation_bytes: int = 2 << 30,
    progress: bool = True,
) -> tuple[LlamaForCausalLM, PruningReport]:
    """Prune a LLaMA; returns a new, smaller model and a report. `model` is left as it is.

    pruning_ratio: mean ratio over the pruned layers, from 0 (an identical model) up to, not including, 1. Or
    target_parameters: the share of the parameters of `target_of` ("model" or "decoder") to be left, above 0 up to 1,
    met within 0.3 points: channels make up what whole heads leave (budget.plan_target).
    pruned_layers, alpha: see ratios.allocate; greedy: heads.select_heads; keep_lowest: channels.select_channels.
    recover: fit the linear regression and fold it in (paper section 4.3).
    head_score(attention, covariance), channel_score(mlp, statistics): scores in the place of the paper's, higher = more
    important. With a head_score the lowest heads go and nothing is searched.
    similarity: layer_similarities(model, input_ids), when it is known already: saves one forward pass.
    batch_size: samples at a time. activation_bytes: a layer's activations are kept up to this size.

    Errors: ValueError naming the setting or the layer: a setting out of range, a target out of reach, an
    architecture that is not LLaMA's, samples longer than the model's limit, activations that are not finite.
    """
    start = time.perf_counter()
    _check(model, input_ids, pruning_ratio, target_parameters, target_of, keep_lowest, batch_size)
    ratios.allocate(torch.zeros(len(model.model.layers)), pruning_ratio or 0.0, pruned_layers, alpha)  # checks them
    pruner = LayerPruner(greedy, keep_lowest, recover, head_score, channel_score, batch_size, activation_bytes)
    if similarity is None:
        similarity = layer_similarities(model, input_ids, batch_size=batch_size, progress=progress)

    def allocation(ratio: float) -> Tensor:
        return ratios.allocate(similarity, ratio, pruned_layers, alpha)

    removals = None
    if target_parameters is not None:
        plan = plan_target(allocation, model, target_parameters, target_of, shift=recover)
        pruning_ratio, removals = plan.pruning_ratio, plan.removals
    layers = _prune_layers(pruner, model, input_ids, allocation(pruning_ratio), removals, similarity, progress)
    pruned = assemble(model, [layer.tensors for layer in layers], [layer.overrides for layer in layers])
    before, after = count_parameters(model), count_parameters(pruned)
    if target_parameters is not None:
        check_met(target_parameters, target_of, after[target_of] / before[target_of])
    report = PruningReport(
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
                if not torch.isfinite(similarity):
                    raise ValueError(f"decoder layer {index}: its activations are not finite; check its weights")
                totals[index] += similarity.cpu() * len(batch)  # every sample has the same number of tokens
                hidden = output
            bar.update(len(batch))
    return totals / len(input_ids)


def _prune_layers(
    pruner: LayerPruner,
    model: LlamaForCausalLM,
    input_ids: Tensor,
    layer_ratios: Tensor,
    removals: list[float] | None,
    similarity: Tensor,
    progress: bool,
) -> list[PrunedLayer]:
    """Layer after layer, each on what comes out of the pruned ones before it.

    removals: parameters that each layer is to lose; what one could not give, or gave too much, the next one settles.
    """
    hidden = torch.cat([calibration.embed(model, batch) for batch in input_ids.split(pruner.batch_size)])
    contexts: dict[int, dict] = {}  # the same for every layer; the last batch may be smaller

    def context(batch: Tensor) -> dict:
        if len(batch) not in contexts:
            contexts[len(batch)] = calibration.layer_context(model, batch)
        return contexts[len(batch)]

    pruned, carried = [], 0.0
    bar = progress_bar(model.model.layers, desc="pruning", unit="layer", progress=progress)
    for index, (layer, ratio) in enumerate(zip(bar, layer_ratios.tolist(), strict=True)):
        removal = None if removals is None or ratio == 0 else removals[index] + carried
        done = pruner(layer, hidden, context, ratio, removal, similarity[index].item(), index)
        if removal is not None:
            carried = removal - (parameters(layer.state_dict()) - parameters(done.tensors))
        pruned.append(done)
    return pruned


def _check(model, input_ids, pruning_ratio, target_parameters, target_of, keep_lowest, batch_size) -> None:
    """All settings, before the first forward pass."""
    require_llama(model)
    if (pruning_ratio is None) == (target_parameters is None):
        raise ValueError(
            f"pruning_ratio is {pruning_ratio} and target_parameters is {target_parameters}: give exactly one of them"
        )
    if target_parameters is not None:
        check_target(target_parameters, target_of)
    channels.check_keep_lowest(keep_lowest)
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
