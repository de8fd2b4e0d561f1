"""What every layer is to lose, and a layer that loses it."""

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor, nn

from slimllm_nb.pruning.layer import LayerPruner, PrunedLayer
from slimllm_nb.pruning.rows import Context


@dataclass(frozen=True)
class Planned:
    """The ratio, and the ratios and the parameters of every layer; removals None: the ratios alone decide."""

    pruning_ratio: float
    layer_ratios: Float[Tensor, "layers 2"]
    removals: list[float] | None

    @cached_property
    def _losing(self) -> list[int]:
        """The layers from which something goes."""
        return self.layer_ratios.any(dim=1).nonzero().flatten().tolist()

    @property
    def first(self) -> int:
        """The first layer from which something goes; the number of layers, when nothing does."""
        return min(self._losing, default=len(self.layer_ratios))

    @property
    def last(self) -> int:
        """The last layer from which something goes; -1: nothing does. Nobody need know what leaves those behind it."""
        return max(self._losing, default=-1)

    def prune(
        self,
        pruner: LayerPruner,
        layer: nn.Module,
        hidden: Float[Tensor, "samples length hidden"],
        context: Context,
        carried: float,
        similarity: float | None,
        index: int,
    ) -> tuple[PrunedLayer, float]:
        """A layer pruned as planned, and what it hands on of `carried`: parameters that the layers before could not
        give, or gave too much, which this one settles. `hidden` is what enters it, and is overwritten with what leaves
        the pruned layer, unless nobody need know."""
        shares = tuple(self.layer_ratios[index].tolist())
        if not any(shares):
            return pruner.spare(layer, hidden if index < self.last else None, context, similarity, index), carried
        removal = None if self.removals is None else self.removals[index] + carried
        done = pruner(layer, hidden, context, shares, removal, similarity, index)
        return done, carried if removal is None else removal - done.removed
