"""Attention and MLP of a decoder layer as pruning sees them.

Both add inputs @ weight' to the residual stream, where `weight` is that of their output projection. What is pruned are
columns of it: the head_dim columns of a query head, the one column of an intermediate channel.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slimllm_nb import calibration
from slimllm_nb.llama import PROJECTIONS, head_columns, key_value_owner, layer_widths


class Sublayer:
    """What attention and MLP have in common. `batches` are their inputs on the residual stream; `count` heads or
    channels; `where` is for errors."""

    name: ClassVar[str]

    def __init__(self, layer: nn.Module, batches: tuple[Tensor, ...], where: str):
        self.layer, self.batches, self.where = layer, batches, where
        self.module, projections = layer.get_submodule(self.name), PROJECTIONS[self.name]
        self.constants = {f"{name}_weight": getattr(self.module, one).weight for name, one in projections.items()}
        self.projection = getattr(self.module, projections["output"])
        self.weight: Float[Tensor, "hidden width"] = self.projection.weight

    def columns(self, kept: Int[Tensor, "kept"]) -> Int[Tensor, "columns"]:
        """The columns of `weight` that belong to these heads or channels."""
        return kept

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
    """What enters `o_proj` is as large as the hidden states, and kept."""

    name = "self_attn"

    def __init__(self, layer: nn.Module, batches: tuple[Tensor, ...], context: Callable[[Tensor], dict], where: str):
        super().__init__(layer, batches, f"{where}, attention")
        self.count, self.head_dim = layer_widths(layer).heads, self.module.head_dim
        self.constants |= {"head_dim": self.head_dim, "key_value_owner": key_value_owner(self.module)}
        self._inputs = [calibration.head_inputs(layer, batch, context(batch)).flatten(1) for batch in batches]

    def inputs(self, index: int, columns: Int[Tensor, "some"] | None = None) -> Float[Tensor, "tokens width"]:
        """What enters `o_proj` for batch `index`, or some columns of it."""
        return self._inputs[index] if columns is None else self._inputs[index].index_select(1, columns)

    def columns(self, kept: Int[Tensor, "kept"]) -> Int[Tensor, "columns"]:
        return head_columns(kept, self.head_dim)

    def _rows(self, kept: Int[Tensor, "kept"]) -> dict[str, Tensor]:
        # A key/value head is kept as long as one of its query heads is.
        key_values = head_columns(key_value_owner(self.module)[kept].unique(), self.head_dim)
        return {"q_proj": self.columns(kept), "k_proj": key_values, "v_proj": key_values}


class Mlp(Sublayer):
    """What enters `down_proj` is kept up to `activation_bytes`, and computed again otherwise."""

    name = "mlp"

    def __init__(self, layer: nn.Module, batches: tuple[Tensor, ...], activation_bytes: int | None, where: str):
        super().__init__(layer, batches, f"{where}, MLP")
        self.count = layer_widths(layer).channels
        if activation_bytes is None:  # then what pruning needs does not grow with the number of tokens
            activation_bytes = max(sum(one.nbytes for one in layer.parameters()), 64 << 20)
        tokens = sum(batch.shape[:-1].numel() for batch in batches)
        self._keeps = tokens * self.count * self.weight.element_size() <= activation_bytes
        self._inputs: dict[int, Tensor] = {}

    def mlp_inputs(self, index: int) -> Float[Tensor, "tokens hidden"]:
        return calibration.mlp_inputs(self.layer, self.batches[index])

    def inputs(self, index: int, columns: Int[Tensor, "some"] | None = None) -> Float[Tensor, "tokens width"]:
        """What enters `down_proj` for batch `index`, or some columns of it."""
        if not self._keeps:
            return calibration.mlp_activations(self.layer, self.mlp_inputs(index), columns)
        if index not in self._inputs:
            self._inputs[index] = calibration.mlp_activations(self.layer, self.mlp_inputs(index))
        return self._inputs[index] if columns is None else self._inputs[index].index_select(1, columns)

    def _rows(self, kept: Int[Tensor, "kept"]) -> dict[str, Tensor]:
        return {"gate_proj": kept, "up_proj": kept}


def require_finite(values: Tensor, where: str, what: str = "activations") -> None:
    """Raises: ValueError that names the layer and its part when a value, or a sum of them, is not finite."""
    # A sum is finite only where all of its terms are: one pass over them.
    if not torch.isfinite(values.sum(dtype=torch.promote_types(values.dtype, torch.float32))):
        raise ValueError(f"{where}: {what} are not finite (NaN or infinite); check the weights and the dtype")
