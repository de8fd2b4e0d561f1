"""From a pruning ratio to the ratios of every layer, by the allocation that a method names."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaForCausalLM

from slimllm_nb.llama import layer_widths
from slimllm_nb.methods import Part, PartError
from slimllm_nb.pruning.budget import of_both_halves, parameters_per_channel, removed_parameters


class Allocator:
    """allocator(pruning_ratio) -> (layers, 2): the ratio of every layer's heads and of its channels.

    known: what is known already of what an allocation may ask for. scores: gives head and channel scores of the dense
    model, layer by layer; None: the allocation does not ask for them.
    """

    def __init__(
        self, part: Part, model: LlamaForCausalLM, known: dict, scores: Callable[[], tuple[list, list]] | None
    ):
        self.part, layers = part, list(model.model.layers)
        per_head = [
            removed_parameters(layer, w.heads, w.key_value_heads, 0, shift=False) / w.heads
            for layer, w in zip(layers, map(layer_widths, layers), strict=True)
        ]
        self.known = {
            **known,
            "num_layers": len(layers),
            "head_parameters": torch.tensor(per_head, dtype=torch.float64),
            "channel_parameters": torch.tensor([parameters_per_channel(one) for one in layers], dtype=torch.float64),
        }
        if scores is not None:
            self.known["head_scores"], self.known["channel_scores"] = scores()

    def __call__(self, pruning_ratio: float) -> Float[Tensor, "layers 2"]:
        """Errors: PartError unless the allocation gives a ratio, or two, for every layer, finite and not negative."""
        ratios = self.part(self.known | {"pruning_ratio": pruning_ratio})
        layers = self.known["num_layers"]
        shape = tuple(ratios.shape) if isinstance(ratios, Tensor) else type(ratios).__name__
        if shape not in ((layers,), (layers, 2)):
            raise PartError(f"{self.part} returned {shape}; allowed: ({layers},), or ({layers}, 2) for heads, channels")
        if not torch.isfinite(ratios).all() or (ratios < 0).any():
            raise PartError(f"{self.part} returned {ratios.tolist()}; allowed: finite ratios, not negative")
        return of_both_halves(ratios.double())
