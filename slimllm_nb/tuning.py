"""Recovery training: LoRA on a pruned model, merged back into its weights (paper section 5.1, the rows "w/ tune").

Beside every projection's weight W (out, in) stand two small matrices A (rank, in) and B (out, rank), and
W + alpha / rank * B A takes its place. B begins as zero, so training begins at the pruned model, and A and B alone are
trained. Merged, the model has the sizes it had: it is saved, exported and pruned again like any other.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel
from transformers import LlamaForCausalLM, set_seed

from slimllm_nb import checks, trainer
from slimllm_nb.files import begun
from slimllm_nb.fingerprint import digest
from slimllm_nb.llama import PROJECTIONS
from slimllm_nb.recipe import IGNORED, Recipe
from slimllm_nb.sources.packages import needing_extra
from slimllm_nb.trainer import Sample

with needing_extra("tuning", "training a pruned model"):
    from peft import LoraConfig, get_peft_model


class TuningReport(BaseModel):
    """tokens: that a loss was computed for, over all epochs. before, validation: the validation loss in nats a token,
    of the pruned model and by step; best_step: of the weights that were kept."""

    recipe: Recipe
    samples: int
    tokens: int
    steps: int
    before: float
    validation: dict[int, float]
    best_step: int
    seconds: float


@torch.enable_grad()
def tune(
    model: LlamaForCausalLM,
    samples: Sequence[Sample],
    *,
    recipe: Recipe | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[LlamaForCausalLM, TuningReport]:
    """Train on samples drawn with the seed, those held out apart; returns the same model, its weights changed, and a
    report. On an accelerator the activations of a layer are computed again when they are needed.

    folder: of what training leaves behind; called again with the same model, samples and settings, it goes on at the
    last evaluation. None: nothing stays.
    Raises: ValueError for a model that is not a plain LLaMA in memory, or on a CPU in half precision; for too few
    samples, and some that are longer than the model's limit; where the accelerator has too little memory left. All
    before training begins.
    """
    start, recipe = time.perf_counter(), recipe or Recipe()
    _check(model, samples, recipe)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = [samples[index] for index in order[: recipe.held_out]]
    train = [samples[index] for index in order[recipe.held_out :][: recipe.samples]]
    with tempfile.TemporaryDirectory() as nowhere, trainer.quiet():
        weights = [one.double().sum().item() for one in model.parameters()]
        key = digest(weights=weights, data=[train, held_out], recipe=recipe, seed=seed)
        place = begun(Path(folder or nowhere), key)
        set_seed(seed)
        names = [name for projections in PROJECTIONS.values() for name in projections.values()]
        options = {"r": recipe.rank, "lora_alpha": recipe.alpha, "lora_dropout": recipe.dropout}
        adapted = get_peft_model(model, LoraConfig(target_modules=names, task_type="CAUSAL_LM", **options))
        adapted.peft_config["default"].base_model_name_or_path = None  # else peft asks the hub for its vocabulary
        try:
            state = trainer.train(adapted, train, held_out, trainer.arguments_of(model, recipe, place, seed), progress)
            adapted.merge_and_unload()
        except BaseException:
            adapted.unload()
            raise
    losses = {one["step"]: one["eval_loss"] for one in state.log_history if "eval_loss" in one}
    counted = sum(int((labels[1:] != IGNORED).sum()) for _, labels in train)
    report = TuningReport(
        recipe=recipe,
        samples=len(train),
        tokens=round(counted * recipe.epochs),
        steps=state.global_step,
        before=losses.pop(0),
        validation=losses,
        best_step=min(losses, key=losses.get),
        seconds=round(time.perf_counter() - start, 1),
    )
    return model.eval(), report


def _check(model: LlamaForCausalLM, samples: Sequence[Sample], recipe: Recipe) -> None:
    checks.require_plain(model)
    checks.require_whole(model)
    if model.device.type == "cpu" and model.dtype != torch.float32:
        raise ValueError(f"the model is in {model.dtype} on the CPU; allowed: float32, or an accelerator")
    wanted = recipe.held_out + (recipe.samples or 1)
    if len(samples) < wanted:
        raise ValueError(f"{len(samples)} samples; {wanted} are needed, {recipe.held_out} of them held out")
    longest = max(len(ids) for ids, _ in samples)
    checks.require_length(model, longest, "samples")
    if model.device.type != "cpu":
        needed = tuning_bytes(model, recipe, longest)
        free = torch.accelerator.get_memory_info(model.device)[0]
        if free < needed:
            raise ValueError(
                f"training needs {needed / 1e9:.1f} GB beside the model, and {free / 1e9:.1f} GB are free: at_once is "
                f"{recipe.at_once}, set a smaller one"
            )


def tuning_bytes(model: LlamaForCausalLM, recipe: Recipe, length: int) -> float:
    """What training takes of an accelerator beside the model: every layer's input; one layer's activations, or the
    logits in float32, their logarithms and gradients; and 16 bytes for every number of A and B (itself, its gradient,
    Adam's moments). Within 15 % of what was counted on an H200 (data/gpu)."""
    config, tokens, size = model.config, min(recipe.at_once, recipe.batch_size) * length, model.dtype.itemsize
    projections = [
        module for layer in model.model.layers for module in layer.modules() if hasattr(module, "in_features")
    ]
    numbers = recipe.rank * sum(one.in_features + one.out_features for one in projections)
    hidden, channels = config.hidden_size, max(layer.mlp.down_proj.in_features for layer in model.model.layers)
    layer = 22 * hidden + 8 * channels
    return (
        tokens * (size * config.num_hidden_layers * hidden + max(size * layer, 12 * config.vocab_size)) + 16 * numbers
    )
