"""Layer after layer of a stored model, batch by batch, with what is finished kept on disk."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slimllm_nb import calibration
from slimllm_nb.disk.resume import Work
from slimllm_nb.disk.stored import StoredModel
from slimllm_nb.progress import bar as progress_bar
from slimllm_nb.pruning.rows import Context
from slimllm_nb.pruning.similarity import through

Step = Callable[[nn.Module, Tensor, Context, int, int], tuple[object, dict[str, Tensor] | None]]
"""step(layer, hidden, context, index, batch_size): overwrites `hidden` (samples, length, hidden) with what leaves the
layer; returns a value for JSON, and tensors, to be kept."""


@dataclass
class Walker:
    """walker(name, step): what the step returns for every layer lies in `work` afterwards. A walk that was begun goes
    on where it was cut off. Out of memory on an accelerator halves the batch for good."""

    stored: StoredModel
    work: Work
    input_ids: Int[Tensor, "samples length"]
    batch_size: int
    progress: bool = True

    def __call__(self, name: str, step: Step) -> None:
        layers = self.stored.num_layers
        start, hidden = self.work.begun(name) or (0, None)
        if start == layers:
            return
        hidden = self.stored.embed(self.input_ids) if hidden is None else hidden.to(self.stored.device)
        options = {"desc": name, "unit": "layer", "initial": start, "total": layers, "progress": self.progress}
        for index in progress_bar(range(start, layers), **options):
            value, tensors = self._within_memory(step, self.stored.layer(index), hidden, index)
            self.work.finish(name, index, hidden, value, tensors)
            del value, tensors  # before the next layer is read

    def _within_memory(self, step: Step, layer: nn.Module, hidden: Tensor, index: int):
        before = hidden.clone()  # a step that fails leaves half of it overwritten
        while True:
            try:
                return step(layer, hidden, calibration.layer_contexts(self.stored.skeleton), index, self.batch_size)
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2
            hidden.copy_(before)
            if self.stored.device.type != "cpu":
                torch.accelerator.empty_cache()
            warnings.warn(
                f"decoder layer {index}: out of memory; from here on {self.batch_size} samples at a time", stacklevel=2
            )


def similarity_step(
    layer: nn.Module, hidden: Float[Tensor, "samples length hidden"], context: Context, index: int, batch_size: int
) -> tuple[float, None]:
    """ratios.layer_similarity of a dense layer, added up as pruning.layer_similarities does."""
    total = torch.zeros((), dtype=torch.float64)
    for batch in hidden.split(batch_size):
        output, similarity = through(layer, batch, context(batch), index)
        total += similarity
        batch.copy_(output)
    return (total / len(hidden)).item(), None
