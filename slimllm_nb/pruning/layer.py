"""One decoder layer through the method: heads, regression, channels, regression (paper sections 4.1 to 4.3).

What heads.head_covariance, channels.channel_importance and regression.fit take whole is gathered here batch by batch
(streaming.py), so that no activation need stay in memory; tests/test_streaming.py ties both together.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from slimllm_nb import calibration, channels, heads, regression
from slimllm_nb.llama import head_columns, key_value_owner, layer_widths
from slimllm_nb.pruning.budget import channels_for, removed_counts
from slimllm_nb.pruning.report import LayerReport
from slimllm_nb.pruning.slicing import NOT_FITTED, Affine, layer_overrides, sliced_attention, sliced_mlp
from slimllm_nb.pruning.streaming import RunningMoments, RunningNorms, RunningScatter

HeadScore = Callable[[nn.Module, Float[Tensor, "hidden heads heads"]], Float[Tensor, "heads"]]
ChannelScore = Callable[[nn.Module, channels.ChannelStatistics], Float[Tensor, "intermediate"]]
Batches = Callable[[], Iterator]  # starts an iteration over what was computed for every batch; may be called again


@dataclass(frozen=True)
class Chosen:
    """What stays of a half of a layer, and the moments to fit the recovery on (None: nothing was pruned)."""

    kept: Int[Tensor, "kept"]
    moments: regression.Moments | None = None


@dataclass(frozen=True)
class Part:
    """The pruned half of a layer: its tensors, what was kept, and how well the regression did."""

    tensors: dict[str, Tensor]
    kept: Int[Tensor, "kept"]
    error_before: float | None = None
    error_after: float | None = None
    mean_scale: float | None = None


@dataclass(frozen=True)
class PrunedLayer:
    """A decoder layer's new tensors and config, and its lines of the report."""

    tensors: dict[str, Tensor]
    overrides: dict
    report: LayerReport


@dataclass(frozen=True)
class LayerPruner:
    """prune()'s settings as far as a single layer is concerned; see prune()."""

    greedy: bool = True
    keep_lowest: float = 0.01
    recover: bool = True
    head_score: HeadScore | None = None
    channel_score: ChannelScore | None = None
    batch_size: int = 8
    activation_bytes: int = 2 << 30

    def __call__(
        self,
        layer: nn.Module,
        hidden: Float[Tensor, "samples length hidden"],
        context: Callable[[Tensor], dict],
        ratio: float,
        removal: float | None,
        similarity: float,
        index: int,
    ) -> PrunedLayer:
        """Prune one layer. `hidden` is what enters it, and is overwritten with what leaves the pruned layer.

        removal: parameters that the layer is to lose, for which the channels make up what whole heads leave; None: the
        ratio alone decides.
        """
        start = time.perf_counter()
        name, batches = f"decoder layer {index}", hidden.split(self.batch_size)
        num_heads, num_channels = removed_counts(layer_widths(layer), ratio)

        entering = self._head_inputs(layer, batches, context)
        attention = self._recover(
            self._choose_heads(layer, entering, num_heads, f"{name}, attention"),
            lambda kept, affine: sliced_attention(layer.self_attn, kept, affine),
        )
        _add_attention(layer.self_attn, batches, entering, attention, name)

        if removal is not None:
            gone = parameters(layer.self_attn.state_dict()) - parameters(attention.tensors)
            num_channels = channels_for(layer, removal - gone, self.recover)
        inside = self._mlp_products(layer, batches)
        mlp = self._recover(
            self._choose_channels(layer, batches, inside, num_channels, f"{name}, MLP"),
            lambda kept, affine: sliced_mlp(layer.mlp, kept, affine),
        )
        _add_mlp(batches, inside, mlp, name)
        clipped = round(ratio * layer_widths(layer).heads) > num_heads
        clipped |= removal is None and round(ratio * layer_widths(layer).channels) > num_channels
        return _finished(layer, attention, mlp, ratio, clipped, similarity, index, time.perf_counter() - start)

    def _choose_heads(self, layer: nn.Module, entering: Batches, num_pruned: int, where: str) -> Chosen:
        """Paper section 4.1, from the covariance of what enters `o_proj`."""
        weight, num_heads = layer.self_attn.o_proj.weight, layer_widths(layer).heads
        if num_pruned == 0:
            return Chosen(torch.arange(num_heads, device=weight.device))
        seen = RunningScatter()
        for rows in entering():
            seen.update(rows)
        _check_finite(seen.scatter, where)
        covariance = heads.covariance_of_contributions(seen.scatter / seen.count, weight, num_heads)
        if self.head_score is None:
            kept = heads.select_heads(covariance, num_pruned, self.greedy)
        else:
            scores = _checked(self.head_score(layer.self_attn, covariance), num_heads, f"{where}: head_score")
            kept = torch.argsort(scores, stable=True)[num_pruned:].sort().values
        return Chosen(kept, _head_moments(covariance, seen.mean, weight, kept))

    def _choose_channels(
        self, layer: nn.Module, batches: tuple[Tensor, ...], inside: Batches, num_pruned: int, where: str
    ) -> Chosen:
        """Paper section 4.2, from norms of what enters the MLP and `down_proj`, and the scatter of what leaves it."""
        mlp, num_channels = layer.mlp, layer_widths(layer).channels
        weight = mlp.down_proj.weight
        if num_pruned == 0:
            return Chosen(torch.arange(num_channels, device=weight.device))
        input_norms, activation_norms, seen = RunningNorms(), RunningNorms(), RunningScatter()
        for batch, (activations, full) in zip(batches, inside(), strict=True):
            input_norms.update(calibration.mlp_inputs(layer, batch))
            activation_norms.update(activations)
            seen.update(full)
        _check_finite(seen.scatter, where)
        statistics = channels.ChannelStatistics(input_norms.norms, activation_norms.norms, seen.scatter)
        if self.channel_score is None:
            scores = channels.importance_from_statistics(statistics, mlp.gate_proj.weight, mlp.up_proj.weight, weight)
        else:
            scores = _checked(self.channel_score(mlp, statistics), num_channels, f"{where}: channel_score")
        kept = channels.select_channels(scores, num_pruned, self.keep_lowest)
        fitted = RunningMoments()
        for activations, full in inside():
            kept_output = functional.linear(activations[:, kept], weight[:, kept])
            fitted.update(regression.moments(kept_output, full), len(full))
        return Chosen(kept, fitted.moments)

    def _recover(self, chosen: Chosen, cut: Callable[[Tensor, Affine], dict[str, Tensor]]) -> Part:
        """Paper section 4.3: fit scale and shift, and cut the weights with both folded in."""
        kept, moments = chosen.kept, chosen.moments
        if moments is None:
            return Part(cut(kept, NOT_FITTED), kept)
        error = regression.relative_error(moments)
        if not self.recover:
            return Part(cut(kept, NOT_FITTED), kept, error_before=error)
        scale, shift = regression.fit_moments(moments)
        return Part(
            cut(kept, Affine(scale, shift)),
            kept,
            error_before=error,
            error_after=regression.relative_error(moments, scale, shift),
            mean_scale=scale.mean().item(),
        )

    def _head_inputs(self, layer: nn.Module, batches: tuple[Tensor, ...], context: Callable) -> Batches:
        def compute(batch: Tensor) -> Tensor:
            return calibration.head_inputs(layer, batch, context(batch)).flatten(1)

        return self._replayable(compute, batches, layer.self_attn.o_proj.in_features)

    def _mlp_products(self, layer: nn.Module, batches: tuple[Tensor, ...]) -> Batches:
        """What enters `down_proj`, and what leaves it."""
        weight = layer.mlp.down_proj.weight

        def compute(batch: Tensor) -> tuple[Tensor, Tensor]:
            activations = calibration.mlp_activations(layer, calibration.mlp_inputs(layer, batch))
            return activations, functional.linear(activations, weight)

        return self._replayable(compute, batches, sum(weight.shape))

    def _replayable(self, compute: Callable, batches: tuple[Tensor, ...], width: int) -> Batches:
        """compute(batch) for every batch, as often as asked: kept in memory where it fits, else computed again."""
        rows = sum(batch.shape[:-1].numel() for batch in batches)
        if rows * width * batches[0].element_size() <= self.activation_bytes:
            stored = [compute(batch) for batch in batches]
            return lambda: iter(stored)
        return lambda: (compute(batch) for batch in batches)


def _add_attention(attention: nn.Module, batches: tuple[Tensor, ...], entering: Batches, part: Part, name: str) -> None:
    """Add the pruned attention's output, by the very weights that are saved, to what enters the layer."""
    columns = head_columns(part.kept, attention.head_dim)
    for batch, rows in zip(batches, entering(), strict=True):
        _add(batch, rows[:, columns], part.tensors, "o_proj", f"{name}, attention")


def _add_mlp(batches: tuple[Tensor, ...], inside: Batches, part: Part, name: str) -> None:
    for batch, (activations, _) in zip(batches, inside(), strict=True):
        _add(batch, activations[:, part.kept], part.tensors, "down_proj", f"{name}, MLP")


def _add(batch: Tensor, rows: Tensor, tensors: dict[str, Tensor], projection: str, where: str) -> None:
    output = functional.linear(rows, tensors[f"{projection}.weight"], tensors.get(f"{projection}.bias"))
    _check_finite(output, where)
    batch += output.view_as(batch)


def parameters(tensors: dict[str, Tensor]) -> int:
    """How many numbers these tensors hold."""
    return sum(tensor.numel() for tensor in tensors.values())


def _finished(
    layer: nn.Module,
    attention: Part,
    mlp: Part,
    ratio: float,
    clipped: bool,
    similarity: float,
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
        ratio=ratio,
        clipped=clipped,
        heads=widths.heads,
        channels=widths.channels,
        kept_heads=attention.kept.tolist(),
        kept_key_value_heads=kept_key_values.tolist(),
        kept_channels=mlp.kept.tolist(),
        attention_error_before=attention.error_before,
        attention_error_after=attention.error_after,
        attention_mean_scale=attention.mean_scale,
        mlp_error_before=mlp.error_before,
        mlp_error_after=mlp.error_after,
        mlp_mean_scale=mlp.mean_scale,
        seconds=seconds,
    )
    overrides = layer_overrides(attention.tensors, mlp.tensors, layer.self_attn.head_dim, queries.tolist())
    return PrunedLayer(tensors, overrides, report)


def _head_moments(
    covariance: Float[Tensor, "hidden heads heads"],
    mean_inputs: Float[Tensor, "width"],
    weight: Float[Tensor, "hidden width"],
    kept: Int[Tensor, "kept"],
) -> regression.Moments:
    """Moments of the kept heads' output against the full one: sums of the contributions' covariances."""
    rows = covariance[:, kept]
    columns = head_columns(kept, weight.shape[1] // covariance.shape[1])
    weight = weight.to(mean_inputs)
    return regression.Moments(
        mean_kept=weight[:, columns] @ mean_inputs[columns],
        mean_full=weight @ mean_inputs,
        var_kept=rows[:, :, kept].sum((1, 2)),
        var_full=covariance.sum((1, 2)),
        cov=rows.sum((1, 2)),
    )


def _check_finite(scatter: Tensor, where: str) -> None:
    if not torch.isfinite(scatter).all():
        raise ValueError(f"{where}: activations are not finite (NaN or infinite); check the weights and the dtype")


def _checked(scores: Tensor, count: int, where: str) -> Tensor:
    if scores.shape != (count,):
        raise ValueError(f"{where} returned shape {tuple(scores.shape)}; allowed: ({count},), a score for each")
    if not torch.isfinite(scores).all():
        raise ValueError(f"{where} returned scores that are not finite")
    return scores
