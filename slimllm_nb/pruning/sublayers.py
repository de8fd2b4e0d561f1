"""Attention and MLP of a decoder layer as pruning sees them.

Both add inputs @ weight' to the residual stream, where `weight` is that of their output projection. What is pruned are
columns of it: the head_dim columns of a query head, the one column of an intermediate channel.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slimllm_nb import calibration
from slimllm_nb.checks import require_finite
from slimllm_nb.llama import PROJECTIONS, head_columns, key_value_owner, layer_widths
from slimllm_nb.methods import Method


def activation_limit(layer: nn.Module) -> int:
    """Bytes of activations that are kept: what pruning needs does not grow with the number of tokens."""
    return max(sum(one.nbytes for one in layer.parameters()), 64 << 20)


@dataclass(frozen=True)
class Settings:
    """prune()'s settings beside the target. gradients: for every layer, what the method's scores ask for."""

    method: Method
    similarity: Float[Tensor, "layers"] | None = None
    seed: int = 0
    gradients: list[dict[str, Tensor]] | None = None

    def __post_init__(self):
        if self.method.tuning is not None:
            raise ValueError(f"method {self.method.name} is trained after pruning: prune without, then tuning.tune()")


class Sublayer:
    """What attention and MLP have in common. `batches` are their inputs on the residual stream; `count` heads or
    channels of `size` columns each; `constants` what parts may ask for before any token is seen; `where` is for errors.
    name: of the sublayer in the layer. label: in errors and in the report."""

    def __init__(self, layer: nn.Module, batches: tuple[Tensor, ...], index: int, settings: Settings):
        self.layer, self.batches, self.where = layer, batches, f"decoder layer {index}, {self.label}"
        self.module, projections = layer.get_submodule(self.name), PROJECTIONS[self.name]
        self.projection = getattr(self.module, projections["output"])
        self.weight: Float[Tensor, "hidden width"] = self.projection.weight
        seed = (settings.seed * 100_003 + index) * 2 + (self.name == "mlp")
        self.constants = {"layer_index": index, "generator": torch.Generator().manual_seed(seed)}
        gradients = settings.gradients[index] if settings.gradients else {}
        for name, projection in projections.items():
            self.constants[f"{name}_weight"] = getattr(self.module, projection).weight
            self.constants[f"{name}_gradient"] = gradients.get(f"{self.name}.{projection}.weight")

    def inputs(self, index: int, columns: Int[Tensor, "some"] | None = None) -> Float[Tensor, "tokens width"]:
        """The input of the output projection for batch `index`, or some columns of it."""
        found = self.known_inputs[index]
        return found if columns is None else found.index_select(1, columns)

    def cut(self, kept: Int[Tensor, "kept"], weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """The tensors of the sublayer with these heads or channels, by their names in the layer. weight, bias: the new
        ones of the output projection. Raises: ValueError where one is not finite."""
        output = f"{self.name}.{PROJECTIONS[self.name]['output']}"
        found = {f"{output}.weight": weight} if bias is None else {f"{output}.weight": weight, f"{output}.bias": bias}
        for projection, rows in self._rows(kept).items():
            for name, one in getattr(self.module, projection).named_parameters():
                found[f"{self.name}.{projection}.{name}"] = one[rows]
        for one in found.values():
            require_finite(one, self.where, "weights")
        return found


class Attention(Sublayer):
    """The input of `o_proj` is as large as the hidden states, and kept."""

    name, label = "self_attn", "attention"

    def __init__(self, layer: nn.Module, batches: tuple, index: int, settings: Settings, context: Callable):
        super().__init__(layer, batches, index, settings)
        self.count, self.size = layer_widths(layer).heads, self.module.head_dim
        self.constants |= {"head_dim": self.size, "key_value_owner": key_value_owner(self.module)}
        self.known_inputs = [calibration.head_inputs(layer, batch, context(batch)).flatten(1) for batch in batches]

    def _rows(self, kept: Int[Tensor, "kept"]) -> dict[str, Tensor]:
        # A key/value head is kept as long as one of its query heads is.
        key_values = head_columns(key_value_owner(self.module)[kept].unique(), self.size)
        return {"q_proj": head_columns(kept, self.size), "k_proj": key_values, "v_proj": key_values}


class Mlp(Sublayer):
    """The input of `down_proj` is kept where it is small, and computed again otherwise."""

    name, label = "mlp", "MLP"

    def __init__(self, layer: nn.Module, batches: tuple[Tensor, ...], index: int, settings: Settings):
        super().__init__(layer, batches, index, settings)
        self.count, self.size = layer_widths(layer).channels, 1
        tokens = sum(batch.shape[:-1].numel() for batch in batches)
        self.keeps = tokens * self.count * self.weight.element_size() <= activation_limit(layer)
        self.known_inputs: dict[int, Float[Tensor, "tokens intermediate"]] = {}

    def mlp_inputs(self, index: int) -> Float[Tensor, "tokens hidden"]:
        return calibration.mlp_inputs(self.layer, self.batches[index])

    def inputs(self, index: int, columns: Int[Tensor, "some"] | None = None) -> Float[Tensor, "tokens width"]:
        if not self.keeps:
            return calibration.mlp_activations(self.layer, self.mlp_inputs(index), columns)
        if index not in self.known_inputs:
            self.known_inputs[index] = calibration.mlp_activations(self.layer, self.mlp_inputs(index))
        return super().inputs(index, columns)

    def _rows(self, kept: Int[Tensor, "kept"]) -> dict[str, Tensor]:
        return {"gate_proj": kept, "up_proj": kept}
