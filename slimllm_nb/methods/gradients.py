"""Gradients of the language-modelling loss, for scores that ask for them (LLM-Pruner, arXiv 2305.11627)."""

from collections.abc import Collection
from contextlib import nullcontext

import torch
from jaxtyping import Int
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaForCausalLM

from slimllm_nb.devices import in_batches
from slimllm_nb.llama import PROJECTIONS
from slimllm_nb.methods.registry import Method
from slimllm_nb.progress import bar as progress_bar

# float16 has no number between 0 and 6e-8: without it 3 % of LLM-Pruner's lowest channels are others.
LOSS_SCALE = 4096


def gradient_names(method: Method) -> list[str]:
    """Which of a layer's parameters ("mlp.up_proj.weight") this method's parts ask the gradients of."""
    parts = {"self_attn": method.head_parts, "mlp": method.channel_parts}
    if method.scores_dense_model:
        parts = {"self_attn": [*parts["self_attn"], method.head_score], "mlp": [*parts["mlp"], method.channel_score]}
    return [
        f"{sublayer}.{projection}.weight"
        for sublayer, names in PROJECTIONS.items()
        for name, projection in names.items()
        if any(f"{name}_gradient" in part.needs for part in parts[sublayer])
    ]


def loss_gradients(
    model: LlamaForCausalLM,
    input_ids: Int[Tensor, "samples length"],
    weights: Collection[str],
    batch_size: int = 8,
    progress: bool = True,
) -> list[dict[str, Tensor]]:
    """For every decoder layer: name in the layer ("mlp.up_proj.weight") -> gradient of the mean loss, in float32.

    weights: names of a layer's parameters. The loss is the mean negative log-likelihood of tokens 2 to the last of
    every sample; in float16 it is multiplied by LOSS_SCALE, and its gradients divided by it. `model` is left as it is.
    """
    parameters = {name: one.detach() for name, one in model.named_parameters()}
    wanted = [[f"model.layers.{index}.{name}" for name in weights] for index in range(len(model.model.layers))]
    leaves = [parameters[name].requires_grad_() for layer in wanted for name in layer]
    scale = LOSS_SCALE if model.dtype == torch.float16 else 1
    totals = [torch.zeros_like(one, dtype=torch.float32) for one in leaves]
    # The fused kernels' backward passes on a GPU add up in no fixed order: the same seed would give other gradients.
    attention = sdpa_kernel(SDPBackend.MATH) if model.device.type != "cpu" else nullcontext()
    with attention, torch.enable_grad(), progress_bar(total=len(input_ids), desc="gradients", progress=progress) as bar:

        def gradients(batch: Tensor) -> tuple[int, tuple[Tensor, ...]]:
            loss = functional_call(model, parameters, (batch,), {"labels": batch, "use_cache": False}).loss
            return len(batch), torch.autograd.grad(loss * scale, leaves)

        for samples, found in in_batches(gradients, input_ids.to(model.device), batch_size, "gradients"):
            for total, gradient in zip(totals, found, strict=True):
                total.add_(gradient, alpha=samples / len(input_ids) / scale)
            bar.update(samples)
    gathered = iter(totals)
    return [{name: next(gathered) for name in weights} for _ in wanted]
