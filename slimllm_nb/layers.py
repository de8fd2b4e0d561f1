"""One decoder layer through the method: heads, regression, channels, regression (paper sections 4.1 to 4.3)."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from slimllm_nb import calibration, channels, heads, regression
from slimllm_nb.budget import layer_widths, removed_counts
from slimllm_nb.report import LayerReport
from slimllm_nb.slicing import (
    NOT_FITTED,
    Affine,
    head_columns,
    key_value_owner,
    layer_overrides,
    sliced_attention,
    sliced_mlp,
)
from slimllm_nb.streaming import RunningMoments, RunningNorms, RunningScatter

HeadScore = Callable[[nn.Module, Float[Tensor, "hidden heads heads"]], Float[Tensor, "heads"]]
ChannelScore = Callable[[nn.Module, channels.ChannelStatistics], Float[Tensor, "intermediate"]]


@dataclass(frozen=True)
class Part:
    """The pruned half of a layer: its tensors, what was kept, and how well the regression did."""

    tensors: dict[str, Tensor]
    kept: Int[Tensor, "kept"]
    affine: Affine = NOT_FITTED
    error_before: float | None = None
    error_after: float | None = None
    mean_scale: float | None = None


@dataclass(frozen=True)
class PrunedLayer:
    """A decoder layer's new tensors and config, and its lines of the report."""

    tensors: dict[str, Tensor]
    overrides: dict
    report: LayerReport


def replayable(compute: Callable, batches: Iterable[Tensor], keep: bool) -> Callable[[], Iterator]:
    """An iterator over compute(batch) that can be started again: from memory (keep), or computed again."""
    if keep:
        stored = [compute(batch) for batch in batches]
        return lambda: iter(stored)
    return lambda: (compute(batch) for batch in batches)


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
        similarity: float,
        index: int,
    ) -> PrunedLayer:
        """Prune one layer. `hidden` is what enters it, and is overwritten with what leaves the pruned layer."""
        start = time.perf_counter()
        widths = layer_widths(layer)
        num_heads, num_channels = removed_counts(widths, ratio)
        attention = self._attention(layer, hidden, context, num_heads, f"decoder layer {index}, attention")
        mlp = self._mlp(layer, hidden, num_channels, f"decoder layer {index}, MLP")
        owner = key_value_owner(layer.self_attn)[attention.kept]
        kept_key_values, queries = owner.unique(return_counts=True)
        norms = {
            name: tensor.clone()
            for name, tensor in layer.state_dict().items()
            if not name.startswith(("self_attn.", "mlp."))
        }
        parts = {f"self_attn.{name}": tensor for name, tensor in attention.tensors.items()}
        parts |= {f"mlp.{name}": tensor for name, tensor in mlp.tensors.items()}
        return PrunedLayer(
            tensors=norms | parts,
            overrides=layer_overrides(attention.tensors, mlp.tensors, layer.self_attn.head_dim, queries.tolist()),
            report=LayerReport(
                index=index,
                similarity=similarity,
                ratio=ratio,
                clipped=round(ratio * widths.heads) > num_heads or round(ratio * widths.channels) > num_channels,
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
                seconds=time.perf_counter() - start,
            ),
        )

    def _attention(self, layer, hidden, context, num_pruned: int, where: str) -> Part:
        attention = layer.self_attn
        weight, num_heads = attention.o_proj.weight, layer_widths(layer).heads
        batches = hidden.split(self.batch_size)
        inputs = replayable(
            lambda batch: calibration.head_inputs(layer, batch, context(batch)).flatten(1),
            batches,
            keep=self._fits(hidden, attention.o_proj.in_features),
        )
        if num_pruned == 0:
            kept = torch.arange(num_heads, device=weight.device)
            part = Part(sliced_attention(attention, kept, NOT_FITTED), kept)
        else:
            seen = RunningScatter()
            for rows in inputs():
                seen.update(rows)
            _check_finite(seen.scatter, where)
            covariance = heads.covariance_of_contributions(seen.scatter / seen.count, weight, num_heads)
            if self.head_score is None:
                kept = heads.select_heads(covariance, num_pruned, self.greedy)
            else:
                scores = _checked(self.head_score(attention, covariance), num_heads, f"{where}: head_score")
                kept = torch.argsort(scores, stable=True)[num_pruned:].sort().values
            moments = _head_moments(covariance, seen.mean, weight, kept)
            part = self._recovered(moments, kept, lambda affine: sliced_attention(attention, kept, affine))
        columns = head_columns(part.kept, attention.head_dim)
        new_weight, new_bias = part.tensors["o_proj.weight"], part.tensors.get("o_proj.bias")
        for batch, rows in zip(batches, inputs(), strict=True):
            batch += functional.linear(rows[:, columns], new_weight, new_bias).view_as(batch)
        return part

    def _mlp(self, layer, hidden, num_pruned: int, where: str) -> Part:
        mlp, batches = layer.mlp, hidden.split(self.batch_size)
        weight, num_channels = mlp.down_proj.weight, layer_widths(layer).channels
        if num_pruned == 0:
            for batch in batches:
                batch += mlp(calibration.mlp_inputs(layer, batch)).view_as(batch)
            kept = torch.arange(num_channels, device=weight.device)
            return Part(sliced_mlp(mlp, kept, NOT_FITTED), kept)

        def compute(batch: Tensor) -> tuple[Tensor, Tensor]:
            activations = calibration.mlp_activations(layer, calibration.mlp_inputs(layer, batch))
            return activations, functional.linear(activations, weight)

        outputs = replayable(compute, batches, keep=self._fits(hidden, num_channels + layer.hidden_size))
        input_norms, activation_norms, seen = RunningNorms(), RunningNorms(), RunningScatter()
        for batch, (activations, full) in zip(batches, outputs(), strict=True):
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

        kept_weight, kept_outputs, fitted = weight[:, kept], [], RunningMoments()
        for activations, full in outputs():
            kept_outputs.append(functional.linear(activations[:, kept], kept_weight))
            fitted.update(regression.moments(kept_outputs[-1], full), len(full))
        part = self._recovered(fitted.moments, kept, lambda affine: sliced_mlp(mlp, kept, affine))
        for batch, output in zip(batches, kept_outputs, strict=True):
            if part.affine.scale is not None:
                output = output * part.affine.scale.to(output.dtype)
            if "down_proj.bias" in part.tensors:
                output = output + part.tensors["down_proj.bias"]
            batch += output.view_as(batch)
        return part

    def _recovered(self, moments: regression.Moments, kept: Tensor, cut: Callable[[Affine], dict]) -> Part:
        error = regression.relative_error(moments)
        if not self.recover:
            return Part(cut(NOT_FITTED), kept, error_before=error)
        scale, shift = regression.fit_moments(moments)
        return Part(
            cut(Affine(scale, shift)),
            kept,
            affine=Affine(scale, shift),
            error_before=error,
            error_after=regression.relative_error(moments, scale, shift),
            mean_scale=scale.mean().item(),
        )

    def _fits(self, hidden: Tensor, width: int) -> bool:
        return hidden.shape[:-1].numel() * width * hidden.element_size() <= self.activation_bytes


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
