"""SlimLLM as a whole, or another method made of parts: prune(model, input_ids, ...) (paper section 4).

Decoder layers are handled in order, each on the output of the pruned ones before it: on the activations that the pruned
model will have. The same loop serves a model on disk (disk.py), which differs in where a layer comes from and goes to.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from slimllm_nb import calibration, checks, ratios
from slimllm_nb.devices import exact_float32, halved
from slimllm_nb.evaluation import count_parameters
from slimllm_nb.methods import MethodLike, as_method
from slimllm_nb.methods.gradients import gradient_names, loss_gradients
from slimllm_nb.progress import bar as progress_bar
from slimllm_nb.pruning.budget import Plan, PruningTarget, check_met
from slimllm_nb.pruning.layer import dense_scores, prune_layer
from slimllm_nb.pruning.report import LayerReport, PartReport, PruningReport
from slimllm_nb.pruning.slicing import assemble
from slimllm_nb.pruning.sublayers import Settings


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
    channel_multiple: int = 1,
    method: MethodLike = "slimllm",
    similarity: Float[Tensor, "layers"] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> tuple[LlamaForCausalLM, PruningReport]:
    """Prune a LLaMA; returns a new, smaller model (in evaluation mode; trainable) and a report. `model` stays as it is.

    pruning_ratio: mean ratio over the pruned layers, from 0 (an identical model) up to, not including, 1. Or
    target_parameters: the share of the parameters of `target_of` ("model" or "decoder") to be left, above 0 up to 1,
    met within 0.3 points: channels make up what whole heads leave (budget.PruningTarget.plan).
    pruned_layers, alpha: see ratios.allocate.
    channel_multiple: pruned layers keep a multiple of so many channels (8 and more: half precision on a GPU; 32: int4
    groups and GGUF's quantized types); what rounding leaves or takes of a target, the layers after it make up.
    method: a name ("slimllm", "flap", ...) or what is to be changed of SlimLLM: {"recovery": "none"}, {"channel_score":
    my_function}; see methods.as_method and methods.STATISTICS.
    similarity: layer_similarities(model, input_ids), when it is known already: saves one forward pass.
    seed: of parts that draw at random. batch_size: samples at a time; out of memory on an accelerator halves it.
    In memory beside the model: five times the tokens' hidden states, the statistics of one layer, and an MLP's
    activations up to the size of its layer's weights (64 MiB in any case; what exceeds it is computed again).

    Raises: ValueError naming the setting, the part or the layer: a setting out of range, a target out of reach, an
    unknown part or one that returns what it may not, an architecture that is not LLaMA's, layers that are not as the
    config says or no plain linear ones, samples with padding or beyond the model's limit, activations that are not
    finite.
    """
    checks.require_plain(model)
    checks.require_whole(model)
    checks.require_ids(model, input_ids)
    target = PruningTarget(pruning_ratio, target_parameters, target_of, pruned_layers, alpha, channel_multiple)
    target.check(model)
    settings = Settings(as_method(method), similarity, seed)
    with checks.evaluation_mode(model):
        return prune_decoder(Layers(model, batch_size), input_ids, target, settings, progress)


@torch.no_grad()
@exact_float32()
def layer_similarities(
    model: LlamaForCausalLM, input_ids: Int[Tensor, "samples length"], *, batch_size: int = 8, progress: bool = True
) -> Float[Tensor, "layers"]:
    """ratios.layer_similarity of every decoder layer of the dense model: one forward pass. Float64, on the CPU.

    Raises: ValueError naming the first layer whose activations are not finite.
    """
    with checks.evaluation_mode(model):
        return _values(walk(Layers(model, batch_size), "layer similarity", _similarity_step, input_ids, progress))


class Layers:
    """Where decoder layers come from, and where what was made of them goes: here, a model in memory. See also
    disk.StoredLayers. batch_size: samples at a time; out of memory on an accelerator halves it for good."""

    def __init__(self, model: LlamaForCausalLM, batch_size: int):
        checks.require_batch_size(batch_size)
        self.model, self.batch_size, self.results = model, batch_size, {}

    def layer(self, index: int) -> nn.Module:
        return self.model.model.layers[index]

    def embed(self, input_ids: Int[Tensor, "samples length"]) -> Float[Tensor, "samples length hidden"]:
        return calibration.embed(self.model, input_ids)

    def begun(self, walk: str) -> tuple[int, Tensor | None]:
        """How many layers of this walk are done already, and the output of the last of them."""
        return 0, None

    def keep(self, walk: str, index: int, hidden: Tensor, value, tensors: dict[str, Tensor]) -> None:
        """A result of one layer: a value for JSON, and tensors. hidden: the layer's output."""
        self.results[walk, index] = value, tensors

    def kept(self, walk: str, index: int) -> tuple:
        return self.results[walk, index]


def walk(layers: Layers, name: str, step: Callable, input_ids: Tensor, progress: bool) -> list[tuple]:
    """step(layer, batches, context, index) for every layer: overwrites the batches (samples, length, hidden) of the
    layer's input with its output; returns a value and tensors. Goes on where it was cut off."""
    total, context = len(layers.model.model.layers), partial(calibration.layer_context, layers.model)
    start, hidden = layers.begun(name)
    if start < total and hidden is None:
        hidden = layers.embed(input_ids)
    options = {"desc": name, "unit": "layer", "initial": start, "total": total, "progress": progress}
    for index in progress_bar(range(start, total), **options):
        layer, before, done = layers.layer(index), hidden.clone(), None
        while done is None:
            with suppress(torch.OutOfMemoryError):  # what the failed step holds is free only behind it
                done = step(layer, hidden.split(layers.batch_size), context, index)
            if done is None:
                layers.batch_size = halved(min(layers.batch_size, len(hidden)), f"decoder layer {index}")
                hidden.copy_(before)  # a step that fails leaves a part of it overwritten
        layers.keep(name, index, hidden, *done)
        del layer, before, done  # before the next layer is read
    return [layers.kept(name, index) for index in range(total)]


@exact_float32()
def prune_decoder(
    layers: Layers, input_ids: Int[Tensor, "samples length"], target: PruningTarget, settings: Settings, progress: bool
) -> tuple[LlamaForCausalLM, PruningReport]:
    """prune() and disk.prune_checkpoint() after their settings were checked."""
    start, method, similarity = time.perf_counter(), settings.method, settings.similarity
    walked = (input_ids, progress)
    if names := gradient_names(method):
        gradients = loss_gradients(layers.model, input_ids, names, layers.batch_size, progress)
        settings = replace(settings, gradients=gradients)
    if similarity is None and "similarity" in method.allocation.needs:
        similarity = _values(walk(layers, "layer similarity", _similarity_step, *walked))
    known = {"similarity": similarity}
    if method.scores_dense_model:
        scores = [tensors for _, tensors in walk(layers, "dense scores", partial(dense_scores, settings), *walked)]
        known |= {name: [one[name] for one in scores] for name in ("head_scores", "channel_scores")}
    plan = target.plan(method, layers.model, known)
    done = walk(layers, "pruning", partial(_prune_step, layers, plan, settings), *walked)
    pruned = assemble(layers.model, [tensors for _, tensors in done], [value["overrides"] for value, _ in done])
    values = [None] * len(done) if similarity is None else similarity.tolist()
    lines = [LayerReport(similarity=one, **value["report"]) for one, (value, _) in zip(values, done, strict=True)]
    before, after = count_parameters(layers.model), count_parameters(pruned)
    sizes = {part: PartReport(before=before[part], after=after[part]) for part in before}
    check_met(target, {part: one.share_left for part, one in sizes.items()})
    asked = asdict(target) | {"pruning_ratio": plan.pruning_ratio}
    asked["target_of"] = None if target.target_parameters is None else target.target_of
    seconds = time.perf_counter() - start
    return pruned, PruningReport(method=method.name, **asked, **sizes, layers=lines, seconds=seconds)


def _values(found: list[tuple[float, dict]]) -> Float[Tensor, "layers"]:
    return torch.tensor([value for value, _ in found], dtype=torch.float64)


def _similarity_step(layer, batches, context, index: int) -> tuple[float, dict]:
    total = 0.0
    for batch in batches:
        output = layer(batch, **context(batch))
        similarity = ratios.layer_similarity(batch.flatten(0, 1), output.flatten(0, 1))
        checks.require_finite(similarity, f"decoder layer {index}")
        total += similarity.item() * len(batch)  # every sample has the same number of tokens
        batch.copy_(output)
    return total / sum(map(len, batches)), {}


def _prune_step(layers, plan: Plan, settings, layer, batches, context, index: int):
    """One layer as planned. carried: parameters that the layers before could not give, or gave too much; this one
    settles them."""
    carried = layers.kept("pruning", index - 1)[0]["carried"] if index else 0.0
    settles = plan.removals is not None and plan.layer_ratios[index].any()
    removal = plan.removals[index].item() + carried if settles else None
    needed = batches if plan.layer_ratios[index:].any() else ()  # behind the last pruned layer no output is needed
    value, tensors = prune_layer(layer, needed, context, plan, removal, index, settings)
    return value | {"carried": carried if removal is None else removal - value["removed"]}, tensors
