"""What every batch of samples gives in one half of a decoder layer, kept or computed again whenever it is asked for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from slimllm_nb import calibration

Context = Callable[[Tensor], dict]


@dataclass(frozen=True)
class Rows:
    """What one batch of samples gives in one half: rows are tokens. `inputs` are computed when they are first asked
    for, and stay as long as this object does."""

    index: range  # the samples' numbers
    length: int  # of a sample
    weight: Float[Tensor, "hidden width"]  # of the output projection
    compute: Callable[[Tensor | None], Tensor]  # what enters that projection, or some of its columns
    mlp_inputs: Callable[[], Tensor] | None = None

    @property
    def tokens(self) -> slice:
        """Where its rows stand among those of all batches."""
        return slice(self.index.start * self.length, self.index.stop * self.length)

    @cached_property
    def inputs(self) -> Float[Tensor, "tokens width"]:
        """What enters the output projection."""
        return self.compute(None)

    def columns(self, chosen: Int[Tensor, "some"]) -> Float[Tensor, "tokens some"]:
        """Some columns of the inputs. Where these do not stand there already, the others are not computed."""
        return self.inputs.index_select(1, chosen) if "inputs" in self.__dict__ else self.compute(chosen)

    def outputs(self) -> Float[Tensor, "tokens hidden"]:
        """What leaves the output projection, without its bias."""
        return functional.linear(self.inputs, self.weight)

    def of_samples(self, chosen: Tensor) -> Tensor:
        """The inputs of some of the samples; chosen: (samples,), whether."""
        return self.inputs.unflatten(0, (len(self.index), -1))[chosen.to(self.inputs.device)].flatten(0, 1)


Iteration = Callable[[], Iterator[Rows]]
"""Starts an iteration over the batches, as often as it is called."""


def head_rows(layer: nn.Module, batches: tuple[Tensor, ...], context: Context) -> Iteration:
    """Of the attention half."""
    weight = layer.self_attn.o_proj.weight
    # As much as the hidden states, so always kept; in one piece, because many that come and go leave holes.
    kept = weight.new_empty(num_tokens(batches), weight.shape[1]).split(num_tokens(batches[:1]))
    for batch, into in zip(batches, kept, strict=True):
        into.copy_(calibration.head_inputs(layer, batch, context(batch)).flatten(1))

    def columns(x: Tensor, chosen: Tensor | None) -> Tensor:
        return x if chosen is None else x.index_select(1, chosen)

    rows = [
        Rows(samples, batch.shape[1], weight, lambda chosen, x=x: columns(x, chosen))
        for batch, samples, x in zip(batches, _numbered(batches), kept, strict=True)
    ]
    return lambda: iter(rows)


def channel_rows(layer: nn.Module, batches: tuple[Tensor, ...], activation_bytes: int | None) -> Iteration:
    """Of the MLP half. Activations within activation_budget are kept; else every iteration computes what it asks for
    again."""
    weight = layer.mlp.down_proj.weight

    def inputs(batch: Tensor) -> Tensor:
        return calibration.mlp_inputs(layer, batch)

    def rows() -> Iterator[Rows]:
        for batch, samples in zip(batches, _numbered(batches), strict=True):
            yield Rows(
                samples,
                batch.shape[1],
                weight,
                lambda chosen, batch=batch: calibration.mlp_activations(layer, inputs(batch), chosen),
                lambda batch=batch: inputs(batch),
            )

    size = num_tokens(batches) * weight.shape[1] * weight.element_size()
    if size > activation_budget(layer, activation_bytes):
        return rows
    kept = list(rows())
    return lambda: iter(kept)


def activation_budget(layer: nn.Module, wanted: int | None) -> int:
    """How many bytes of an MLP's activations are kept: what is wanted, or as much as the layer's weights, and 64 MiB in
    any case. Then what pruning needs does not grow with the number of tokens."""
    if wanted is not None:
        return wanted
    return max(sum(one.numel() * one.element_size() for one in layer.parameters()), 64 << 20)


def num_tokens(batches: tuple[Tensor, ...]) -> int:
    """How many tokens they hold."""
    return sum(batch.shape[:-1].numel() for batch in batches)


def _numbered(batches: tuple[Tensor, ...]) -> Iterator[range]:
    """The numbers of the samples in every batch."""
    start = 0
    for batch in batches:
        yield range(start, start + len(batch))
        start += len(batch)
