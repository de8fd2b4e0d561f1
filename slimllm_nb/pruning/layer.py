"""One decoder layer through a method: heads, recovery, channels, recovery (paper sections 4.1 to 4.3)."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from slimllm_nb import regression
from slimllm_nb.llama import key_value_owner, layer_widths
from slimllm_nb.methods import Approximate, Method, Part, PartError
from slimllm_nb.methods.registry import checked_choice, checked_scores
from slimllm_nb.pruning.budget import channels_for, removed_counts
from slimllm_nb.pruning.quantities import ChannelQuantities, HeadQuantities, Quantities, needed, require_finite
from slimllm_nb.pruning.report import LayerReport
from slimllm_nb.pruning.rows import Context, channel_rows, head_rows, num_tokens
from slimllm_nb.pruning.slicing import Recovered, layer_overrides, sliced_attention, sliced_mlp


@dataclass(frozen=True)
class Half:
    """The pruned half of a layer: its tensors, the heads or channels and columns kept, and how well it was mended."""

    tensors: dict[str, Tensor]
    kept: Int[Tensor, "kept"]
    columns: Int[Tensor, "columns"] | None = None  # None: nobody computes what comes out
    error_before: float | None = None
    error_after: float | None = None
    mean_scale: float | None = None
    measure: bool = False  # error_after is to be measured on what comes out
    affine: tuple[Tensor | None, Tensor | None] | None = None  # scale and shift of what the kept columns gave before
    notes: dict[str, float] = field(default_factory=dict)  # what the recovery says of itself


@dataclass(frozen=True)
class PrunedLayer:
    """A decoder layer's new tensors and config, and its lines of the report."""

    tensors: dict[str, Tensor]
    overrides: dict
    report: LayerReport
    removed: int  # parameters


@dataclass(frozen=True)
class LayerPruner:
    """A method and prune()'s settings as far as a single layer is concerned; see prune().

    gradients: for every layer, what the method's scores ask for.
    """

    method: Method
    batch_size: int = 8
    activation_bytes: int | None = None
    seed: int = 0
    gradients: list[dict[str, Tensor]] | None = None

    @torch.no_grad()
    def __call__(
        self,
        layer: nn.Module,
        hidden: Float[Tensor, "samples length hidden"],
        context: Context,
        ratios: tuple[float, float],
        removal: float | None,
        similarity: float | None,
        index: int,
    ) -> PrunedLayer:
        """Prune one layer. `hidden` is what enters it, and is overwritten with what leaves the pruned layer.

        ratios: of the heads and of the channels. removal: parameters that the layer is to lose, for which the channels
        make up what whole heads leave; None: the ratios alone decide.
        """
        start = time.perf_counter()
        batches, widths = hidden.split(self.batch_size), layer_widths(layer)
        num_heads, num_channels = removed_counts(widths, *ratios)

        method = self.method
        quantities = self._head_quantities(layer, batches, context, index, method.head_parts)
        chosen = self._choose(quantities, method.head_score, method.head_selection, widths.heads, num_heads)
        attention = self._recover(quantities, chosen, widths.heads, sliced_attention)
        attention = _push(batches, quantities, attention)

        if removal is not None:
            gone = parameters(layer.self_attn.state_dict()) - parameters(attention.tensors)
            num_channels = channels_for(layer, removal - gone, method.recovery.adds_bias)
        quantities = self._channel_quantities(layer, batches, context, index, method.channel_parts)
        chosen = self._choose(quantities, method.channel_score, method.channel_selection, widths.channels, num_channels)
        mlp = self._recover(quantities, chosen, widths.channels, sliced_mlp)
        mlp = _push(batches, quantities, mlp)

        clipped = round(ratios[0] * widths.heads) > num_heads
        clipped |= removal is None and round(ratios[1] * widths.channels) > num_channels
        return _finished(layer, attention, mlp, ratios, clipped, similarity, index, time.perf_counter() - start)

    @torch.no_grad()
    def scores(
        self, layer: nn.Module, hidden: Float[Tensor, "samples length hidden"], context: Context, index: int
    ) -> tuple[Float[Tensor, "heads"], Float[Tensor, "intermediate"]]:
        """Head and channel scores of a layer from which nothing goes. `hidden` is overwritten with what leaves it."""
        batches, widths = hidden.split(self.batch_size), layer_widths(layer)
        found = []
        for make, part, count, cut in (
            (self._head_quantities, self.method.head_score, widths.heads, sliced_attention),
            (self._channel_quantities, self.method.channel_score, widths.channels, sliced_mlp),
        ):
            quantities = make(layer, batches, context, index, [part])
            quantities.known["order_decides"] = False
            found.append(checked_scores(part, part(quantities), count, quantities.where))
            _push(batches, quantities, self._recover(quantities, None, count, cut))
        return found[0], found[1]

    @torch.no_grad()
    def spare(
        self,
        layer: nn.Module,
        hidden: Float[Tensor, "samples length hidden"] | None,
        context: Context,
        similarity: float | None,
        index: int,
    ) -> PrunedLayer:
        """A layer from which nothing goes, as it is. `hidden` is overwritten with what leaves it; None: nobody asks.

        Errors: ValueError unless its weights, and what leaves it, are finite.
        """
        start, widths, where = time.perf_counter(), layer_widths(layer), f"decoder layer {index}"
        attention = _whole(layer.self_attn, widths.heads, sliced_attention)
        mlp = _whole(layer.mlp, widths.channels, sliced_mlp)
        for half, name in ((attention, "attention"), (mlp, "MLP")):
            for tensor in half.tensors.values():
                require_finite(tensor, f"{where}, {name}", "weights")
        for batch in () if hidden is None else hidden.split(self.batch_size):
            batch.copy_(layer(batch, **context(batch)))
            require_finite(batch, where)
        return _finished(layer, attention, mlp, (0.0, 0.0), False, similarity, index, time.perf_counter() - start)

    def _choose(
        self, quantities: Quantities, score: Part, selection: Part, count: int, num_pruned: int
    ) -> Int[Tensor, "kept"] | None:
        """What stays; None: everything."""
        if num_pruned == 0:
            return None
        quantities.known["num_pruned"], place = num_pruned, quantities.known["output_weight"].device
        if "scores" in selection.needs:
            quantities.known["order_decides"] = selection.by_rank
            scores = score(quantities)
            if isinstance(scores, Approximate):
                checked_scores(score, scores.values, count, quantities.where)
                scores = scores.settled(selection, num_pruned)
            quantities.known["scores"] = checked_scores(score, scores, count, quantities.where).to(place)
        return checked_choice(selection, selection(quantities), count, num_pruned, quantities.where).to(place)

    def _recover(
        self, quantities: Quantities, kept: Tensor | None, count: int, cut: Callable[..., dict[str, Tensor]]
    ) -> Half:
        """Paper section 4.3, or another way to mend: the weights cut, with the recovery folded in."""
        weight, module = quantities.known["output_weight"], quantities.module
        bias = quantities.projection.bias
        if kept is None:
            whole = _whole(module, count, cut)
            quantities.keep(whole.kept)
            return replace(whole, columns=quantities["kept"], affine=_affine(weight, None, bias))
        quantities.keep(kept)
        columns, part = quantities["kept"], self.method.recovery
        error = regression.relative_error(quantities["moments"])
        result = part(quantities)
        if result is None:
            return Half(cut(module, kept, None), kept, columns, error, affine=_affine(weight, None, bias))
        first, second, notes = _checked_recovery(part, result, weight, columns, quantities.where)
        if first.ndim == 1:  # a scale and a shift
            after = regression.relative_error(quantities["moments"], first, second)
            recovered = Recovered(first, second)
            affine = _affine(weight, first, second if bias is None else second + bias.double())
            mean = first.mean().item()
            return Half(cut(module, kept, recovered), kept, columns, error, after, mean, notes=notes, affine=affine)
        return Half(cut(module, kept, Recovered(first, second)), kept, columns, error, measure=True, notes=notes)

    def _known(self, kind: type[Quantities], index: int) -> dict:
        half = (HeadQuantities, ChannelQuantities).index(kind)
        generator = torch.Generator().manual_seed((self.seed * 100_003 + index) * 2 + half)
        gradients = kind.gradients(self.gradients[index]) if self.gradients else {}
        return {"layer_index": index, "generator": generator} | gradients

    def _head_quantities(
        self, layer: nn.Module, batches: tuple[Tensor, ...], context: Context, index: int, parts: list[Part]
    ) -> Quantities:
        where, known = f"decoder layer {index}, attention", self._known(HeadQuantities, index)
        rows = head_rows(layer, batches, context)
        return HeadQuantities(layer, rows, needed(parts), where, num_tokens(batches), **known)

    def _channel_quantities(
        self, layer: nn.Module, batches: tuple[Tensor, ...], context: Context, index: int, parts: list[Part]
    ) -> Quantities:
        where, known = f"decoder layer {index}, MLP", self._known(ChannelQuantities, index)
        rows = channel_rows(layer, batches, self.activation_bytes)
        return ChannelQuantities(layer, rows, needed(parts), where, num_tokens(batches), **known)


def _whole(module: nn.Module, count: int, cut: Callable[..., dict[str, Tensor]]) -> Half:
    """A half from which nothing goes."""
    everything = torch.arange(count, device=next(module.parameters()).device)
    return Half(cut(module, everything, None), everything)


def _affine(weight: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor | None, Tensor | None] | None:
    """Scale and shift in the weight's dtype. None below float32: there the rounded weights of the pruned model decide,
    and what it will see is computed with them."""
    if weight.dtype not in (torch.float32, torch.float64):
        return None
    return tuple(None if one is None else one.to(weight.dtype) for one in (scale, shift))


def _push(batches: tuple[Tensor, ...], quantities: Quantities, half: Half) -> Half:
    """Add what the pruned half gives to the residual stream, batch by batch."""
    projection = quantities.weights["output"]
    weight, bias = half.tensors[f"{projection}.weight"], half.tensors.get(f"{projection}.bias")
    full_bias, squares, energy = quantities.projection.bias, 0.0, 0.0
    for batch, rows in zip(batches, quantities.rows(), strict=True):
        full = rows.outputs() if half.measure else None
        if half.affine is None:
            output = functional.linear(rows.columns(half.columns), weight, bias)
        else:
            output = _transformed(quantities.kept_output(rows), *half.affine)
        require_finite(output, quantities.where)
        if half.measure:
            full = full.double()
            mended = output.double() if full_bias is None else output.double() - full_bias.double()
            squares, energy = squares + (mended - full).square().sum(), energy + full.square().sum()
        batch += output.view_as(batch)
    if not half.measure:
        return half
    error = (squares / energy.clamp_min(torch.finfo(energy.dtype).tiny)).sqrt().item()
    return replace(half, error_after=error)


def _transformed(output: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is not None:
        return torch.addcmul(shift, output, scale)
    return output if shift is None else output + shift


def _checked_recovery(
    part: Part, result, weight: Tensor, columns: Tensor, where: str
) -> tuple[Tensor, Tensor | None, dict[str, float]]:
    """The pair and the notes. Errors: PartError unless it is a scale and a shift, or a weight and a bias (or None), all
    finite."""
    hidden, shapes = weight.shape[0], [((weight.shape[0],),) * 2, ((weight.shape[0], len(columns)), (weight.shape[0],))]
    try:
        first, second, notes = (*result, {})[:3] if len(result) in (2, 3) else result
        found = (tuple(first.shape), (hidden,) if second is None else tuple(second.shape))
    except (TypeError, ValueError, AttributeError) as error:
        raise PartError(
            f"{where}: {part} returned {type(result).__name__}; allowed: a pair of tensors (and a dict of notes), None"
        ) from error
    if found not in shapes or (first.ndim == 1 and second is None):
        raise PartError(f"{where}: {part} returned shapes {found[0]}, {found[1]}; allowed: {shapes[0]} or {shapes[1]}")
    if not torch.isfinite(first).all() or (second is not None and not torch.isfinite(second).all()):
        raise PartError(f"{where}: {part} returned values that are not finite")
    first, second = (None if one is None else one.to(weight.device, torch.float64) for one in (first, second))
    return first, second, notes


def parameters(tensors: dict[str, Tensor]) -> int:
    """How many numbers these tensors hold."""
    return sum(tensor.numel() for tensor in tensors.values())


def _finished(
    layer: nn.Module,
    attention: Half,
    mlp: Half,
    ratios: tuple[float, float],
    clipped: bool,
    similarity: float | None,
    index: int,
    seconds: float,
) -> PrunedLayer:
    """The parts and the layer's norms as one, with its config and its lines of the report."""
    owner = key_value_owner(layer.self_attn)[attention.kept]
    kept_key_values, queries = owner.unique(return_counts=True)
    tensors = {
        name: tensor.clone()
        for name, tensor in layer.state_dict().items()
        if not name.startswith(("self_attn.", "mlp."))
    }
    tensors |= {f"self_attn.{name}": tensor for name, tensor in attention.tensors.items()}
    tensors |= {f"mlp.{name}": tensor for name, tensor in mlp.tensors.items()}
    widths = layer_widths(layer)
    report = LayerReport(
        index=index,
        similarity=similarity,
        ratio=ratios[0],
        channel_ratio=ratios[1],
        clipped=clipped,
        heads=widths.heads,
        channels=widths.channels,
        kept_heads=attention.kept.tolist(),
        kept_key_value_heads=kept_key_values.tolist(),
        kept_channels=mlp.kept.tolist(),
        attention_error_before=attention.error_before,
        attention_error_after=attention.error_after,
        attention_mean_scale=attention.mean_scale,
        attention_notes=attention.notes,
        mlp_error_before=mlp.error_before,
        mlp_error_after=mlp.error_after,
        mlp_mean_scale=mlp.mean_scale,
        mlp_notes=mlp.notes,
        seconds=seconds,
    )
    overrides = layer_overrides(attention.tensors, mlp.tensors, layer.self_attn.head_dim, queries.tolist())
    return PrunedLayer(tensors, overrides, report, parameters(layer.state_dict()) - parameters(tensors))
