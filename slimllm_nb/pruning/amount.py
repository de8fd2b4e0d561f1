"""How much is to go: prune()'s settings, checked before anything is computed, and made into what every layer loses."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import LlamaForCausalLM

from slimllm_nb import ratios
from slimllm_nb.evaluation import count_parameters
from slimllm_nb.llama import require_length, require_llama
from slimllm_nb.methods import Method
from slimllm_nb.pruning.allocation import Allocator
from slimllm_nb.pruning.budget import check_met, check_target, plan_target
from slimllm_nb.pruning.planned import Planned
from slimllm_nb.pruning.report import LayerReport, PartReport, PruningReport


@dataclass(frozen=True)
class Amount:
    """See prune(): either a ratio or a target."""

    pruning_ratio: float | None
    target_parameters: float | None
    target_of: str
    pruned_layers: int
    alpha: float

    def check(self, model: LlamaForCausalLM) -> None:
        """Errors: ValueError naming the setting that is out of range."""
        if (self.pruning_ratio is None) == (self.target_parameters is None):
            raise ValueError(
                f"pruning_ratio is {self.pruning_ratio} and target_parameters is {self.target_parameters}: "
                "give exactly one of them"
            )
        if self.target_parameters is not None:
            check_target(self.target_parameters, self.target_of)
        nothing = torch.zeros(len(model.model.layers))
        ratios.allocate(nothing, self.pruning_ratio or 0.0, self.pruned_layers, self.alpha)  # checks them

    def planned(self, allocator: Allocator, model: LlamaForCausalLM, method: Method) -> Planned:
        """What every layer loses. Errors: those of the allocation; ValueError for a target out of reach."""
        if self.target_parameters is None:
            return Planned(self.pruning_ratio, allocator(self.pruning_ratio), None)
        shift = method.recovery.adds_bias
        plan = plan_target(allocator, model, self.target_parameters, self.target_of, shift)
        return Planned(plan.pruning_ratio, allocator(plan.pruning_ratio), plan.removals)

    def report(
        self,
        method: Method,
        planned: Planned,
        model: LlamaForCausalLM,
        pruned: LlamaForCausalLM,
        layers: list[LayerReport],
        seconds: float,
    ) -> PruningReport:
        """What was done. Errors: ValueError where a target was missed."""
        before, after = count_parameters(model), count_parameters(pruned)
        target = self.target_parameters
        if target is not None:
            check_met(target, self.target_of, after[self.target_of] / before[self.target_of])
        return PruningReport(
            method=method.name,
            pruning_ratio=planned.pruning_ratio,
            pruned_layers=self.pruned_layers,
            alpha=self.alpha,
            target_parameters=target,
            target_of=None if target is None else self.target_of,
            model=PartReport(before=before["model"], after=after["model"]),
            decoder=PartReport(before=before["decoder"], after=after["decoder"]),
            layers=layers,
            seconds=seconds,
        )


def check_input(model: LlamaForCausalLM, input_ids: Int[Tensor, "samples length"], batch_size: int) -> None:
    """Errors: ValueError for a model that is no LLaMA, for samples that it cannot read, and for a batch of none."""
    require_llama(model)
    if input_ids.ndim != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids is {input_ids.dtype} of shape {tuple(input_ids.shape)}; allowed: integers, (samples, length)"
        )
    if input_ids.min() < 0 or input_ids.max() >= model.config.vocab_size:
        raise ValueError(
            f"input_ids holds tokens {input_ids.min()} to {input_ids.max()}; allowed: 0 to "
            f"{model.config.vocab_size - 1}: the tokenizer does not fit the model"
        )
    require_length(model, input_ids.shape[1], "a calibration sample")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; allowed: at least 1")
