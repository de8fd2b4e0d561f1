"""How similar what leaves a dense decoder layer is to what enters it (paper section 4.4): one forward pass."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from slimllm_nb import calibration, ratios
from slimllm_nb.progress import bar as progress_bar
from slimllm_nb.pruning.quantities import require_finite


@torch.no_grad()
def layer_similarities(
    model: LlamaForCausalLM, input_ids: Int[Tensor, "samples length"], *, batch_size: int = 8, progress: bool = True
) -> Float[Tensor, "layers"]:
    """ratios.layer_similarity of every decoder layer of the dense model: one forward pass. Float64, on the CPU.

    Errors: ValueError naming the first layer whose activations are not finite.
    """
    return dense_pass(model, input_ids, 0, batch_size, progress)[0]


def dense_pass(
    model: LlamaForCausalLM, input_ids: Int[Tensor, "samples length"], leading: int, batch_size: int, progress: bool
) -> tuple[Float[Tensor, "layers"], list[list[Tensor]]]:
    """layer_similarities, and what leaves each of the first `leading` layers, in batches."""
    leaving = [[] for _ in model.model.layers[:leading]]
    totals = torch.zeros(len(model.model.layers), dtype=torch.float64)
    context = calibration.layer_contexts(model)
    with progress_bar(total=len(input_ids), desc="layer similarity", unit="sample", progress=progress) as bar:
        for batch in input_ids.split(batch_size):
            hidden = calibration.embed(model, batch)
            for index, layer in enumerate(model.model.layers):
                hidden, similarity = through(layer, hidden, context(hidden), index)
                totals[index] += similarity
                if index < leading:
                    leaving[index].append(hidden)
            bar.update(len(batch))
    return totals / len(input_ids), leaving


def through(
    layer: nn.Module, batch: Float[Tensor, "samples length hidden"], context: dict, index: int
) -> tuple[Float[Tensor, "samples length hidden"], Float[Tensor, ""]]:
    """What leaves the layer, and the sum over the samples of how similar it is to what entered; on the CPU."""
    output = layer(batch, **context)
    similarity = ratios.layer_similarity(batch.flatten(0, 1), output.flatten(0, 1))
    require_finite(similarity, f"decoder layer {index}")
    return output, similarity.cpu() * len(batch)  # every sample has the same number of tokens
