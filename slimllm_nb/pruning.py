"""SlimLLM as a whole: prune(model, input_ids, ...) (paper section 4).

Decoder layers are handled in order. Inside a layer the heads go first; the MLP is scored on the output of the pruned
attention, and the next layer on the output of the pruned layer: on the activations that the pruned model will have.
"""

import time

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM

from slimllm_nb import calibration, ratios
from slimllm_nb.budget import TOLERANCE, find_ratio, layer_widths
from slimllm_nb.evaluation import count_parameters
from slimllm_nb.layers import ChannelScore, HeadScore, LayerPruner, PrunedLayer
from slimllm_nb.report import PartReport, PruningReport
from slimllm_nb.slicing import assemble

MAX_ATTEMPTS = 4  # prunings to meet a parameter target where key/value heads are shared


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
    target_parameters: the share of the parameters of `target_of` ("model" or "decoder") to be left, above 0 up to 1;
    the ratio that meets it within 0.3 points is searched for.
    pruned_layers, alpha: see ratios.allocate; greedy: heads.select_heads; keep_lowest: channels.select_channels.
    recover: fit the linear regression and fold it in (paper section 4.3).
    head_score(attention, covariance), channel_score(mlp, statistics): scores in the place of the paper's, higher = more
    important. With a head_score the lowest heads go and nothing is searched.
    similarity: layer_similarities(model, input_ids), when it is known already: saves one forward pass.
    batch_size: samples at a time. activation_bytes: a layer's activations are kept up to this size.

    Errors: ValueError naming the setting or the layer: a setting out of range, a target that no ratio meets, an
    architecture that is not LLaMA's, activations that are not finite.
    """
    start = time.perf_counter()
    _check(model, input_ids, pruning_ratio, target_parameters, batch_size)
    # All settings are checked before the first forward pass.
    ratios.allocate(torch.zeros(len(model.model.layers)), pruning_ratio or 0.0, pruned_layers, alpha)
    pruner = LayerPruner(greedy, keep_lowest, recover, head_score, channel_score, batch_size, activation_bytes)
    if similarity is None:
        similarity = layer_similarities(model, input_ids, batch_size=batch_size, progress=progress)

    def allocation(ratio: float) -> Tensor:
        return ratios.allocate(similarity, ratio, pruned_layers, alpha)

    attempts, losses, total = 1, [0] * len(similarity), count_parameters(model)
    while True:
        if target_parameters is not None:
            pruning_ratio = find_ratio(allocation, model, target_parameters, target_of, losses, shift=recover)
        layers = _prune_layers(pruner, model, input_ids, allocation(pruning_ratio), similarity, progress)
        pruned = assemble(model, [layer.tensors for layer in layers], [layer.overrides for layer in layers])
        left = count_parameters(pruned)
        if target_parameters is None or abs(left[target_of] / total[target_of] - target_parameters) <= TOLERANCE:
            break
        # Grouped queries: which key/value heads lost their last query head is known only now.
        if attempts == MAX_ATTEMPTS:
            raise ValueError(
                f"target_parameters is {target_parameters} of the {target_of}; after {attempts} prunings "
                f"{left[target_of] / total[target_of]:.4f} are left, which is not within {TOLERANCE}: whole key/value "
                f"heads come and go with the ratio. Change the target a little, or pruned_layers or alpha"
            )
        attempts += 1
        losses = [
            before.key_value_heads - after.key_value_heads
            for before, after in zip(
                map(layer_widths, model.model.layers), map(layer_widths, pruned.model.layers), strict=True
            )
        ]
    report = PruningReport(
        pruning_ratio=pruning_ratio,
        pruned_layers=pruned_layers,
        alpha=alpha,
        target_parameters=target_parameters,
        target_of=None if target_parameters is None else target_of,
        attempts=attempts,
        model=PartReport(before=total["model"], after=left["model"]),
        decoder=PartReport(before=total["decoder"], after=left["decoder"]),
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
    with tqdm(total=len(input_ids), desc="layer similarity", unit="sample", disable=not progress, leave=False) as bar:
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
    similarity: Tensor,
    progress: bool,
) -> list[PrunedLayer]:
    hidden = torch.cat([calibration.embed(model, batch) for batch in input_ids.split(pruner.batch_size)])
    contexts: dict[int, dict] = {}  # the same for every layer; the last batch may be smaller

    def context(batch: Tensor) -> dict:
        if len(batch) not in contexts:
            contexts[len(batch)] = calibration.layer_context(model, batch)
        return contexts[len(batch)]

    layers = list(zip(model.model.layers, layer_ratios.tolist(), similarity.tolist(), strict=True))
    return [
        pruner(layer, hidden, context, ratio, similar, index)
        for index, (layer, ratio, similar) in enumerate(
            tqdm(layers, desc="pruning", unit="layer", disable=not progress, leave=False)
        )
    ]


def _check(model, input_ids, pruning_ratio, target_parameters, batch_size) -> None:
    architecture = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if architecture not in ("llama", "slim_llama"):
        raise ValueError(f"the model's architecture is {architecture!r}; allowed: 'llama' (and what prune() returns)")
    if (pruning_ratio is None) == (target_parameters is None):
        raise ValueError(
            f"pruning_ratio is {pruning_ratio} and target_parameters is {target_parameters}: give exactly one of them"
        )
    if input_ids.ndim != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids is {input_ids.dtype} of shape {tuple(input_ids.shape)}; allowed: integers, (samples, length)"
        )
    if input_ids.min() < 0 or input_ids.max() >= model.config.vocab_size:
        raise ValueError(
            f"input_ids holds tokens {input_ids.min()} to {input_ids.max()}; allowed: 0 to "
            f"{model.config.vocab_size - 1}: the tokenizer does not fit the model"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; allowed: at least 1")
