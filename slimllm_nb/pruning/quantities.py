"""What the parts of a method ask for, gathered over the tokens of one half of a decoder layer: what nobody asks for is
not computed, and everything is computed once.

What heads.head_covariance, channels.channel_importance and regression.fit take whole is gathered here batch by batch
(streaming.py), so that no activation need stay in memory; tests/test_streaming.py ties both together.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from slimllm_nb import heads, regression
from slimllm_nb.llama import head_columns, key_value_owner, layer_widths
from slimllm_nb.methods import Part
from slimllm_nb.pruning.streaming import RunningMoments, RunningNorms, RunningScatter

HOLD_OUT = 8  # one sample in so many is held out from what a recovery is fitted on, when it asks for that


@dataclass(frozen=True)
class Rows:
    """What one batch of samples gives in one half: rows are tokens."""

    inputs: Tensor  # what enters the output projection
    samples: int
    outputs: Callable[[], Tensor]  # what leaves it, without its bias
    mlp_inputs: Callable[[], Tensor] | None = None


ATTENTION_WEIGHTS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
MLP_WEIGHTS = {"gate": "gate_proj", "up": "up_proj", "output": "down_proj"}


def needed(parts: Iterable[Part]) -> set[str]:
    """All that these parts ask for."""
    return {name for part in parts for name in part.needs}


def gradient_names(parts: Iterable[Part], weights: dict[str, str], half: str) -> list[str]:
    """Which of a layer's parameters these parts ask the gradients of."""
    wanted = needed(parts)
    return [f"{half}.{projection}.weight" for name, projection in weights.items() if f"{name}_gradient" in wanted]


class Quantities:
    """The quantities of one half by name, each computed when it is first asked for.

    rows: starts an iteration over the batches, as often as asked. wanted: all names that will be asked for, so that one
    iteration gathers them together. where: for errors.
    """

    def __init__(
        self, layer: nn.Module, rows: Callable[[], Iterator[Rows]], wanted: Collection[str], where: str, **known
    ):
        self.rows, self.where = rows, where
        self.half = self.module(layer)
        self.projection_bias = self.projection(layer).bias
        self._wanted = set(wanted)
        self.known = {"output_weight": self.projection(layer).weight, **self._constants(layer), **known}
        for name, projection in self.weights.items():
            self.known[f"{name}_weight"] = self.half.get_submodule(projection).weight

    def __getitem__(self, name: str):
        if name not in self.known:
            if name == "moments":
                self.known[name] = self._moments()
            else:
                self._gather()
        return self.known[name]

    def _gather(self) -> None:
        """One iteration over the batches for everything that is wanted and summed over tokens."""
        wanted = self._wanted - set(self.known)
        running = {}
        if "input_norms" in wanted:
            running["norms"] = RunningNorms()
        if "mlp_input_norms" in wanted:
            running["mlp_norms"] = RunningNorms()
        if "output_scatter" in wanted:
            running["outputs"] = RunningScatter()
        split = bool(wanted & {"fitted_covariance", "fitted_means", "held_out_covariance", "held_out_means"})
        if split:
            running |= {"fitted": RunningScatter(), "held_out": RunningScatter()}
        elif wanted & {"input_covariance", "contribution_covariance"}:
            running["inputs"] = RunningScatter()
        elif wanted & {"input_means", "input_variances"}:
            running["inputs"] = RunningScatter(diagonal=True)
        stored = {name: [] for name in ("inputs", "mlp_inputs") if name in wanted}
        seen = 0
        for batch in self.rows():
            if "mlp_norms" in running:
                running["mlp_norms"].update(batch.mlp_inputs())
            if "norms" in running:
                running["norms"].update(batch.inputs)
            if "outputs" in running:
                running["outputs"].update(batch.outputs())
            if "inputs" in running:
                running["inputs"].update(batch.inputs)
            if split:
                by_sample = batch.inputs.unflatten(0, (batch.samples, -1))
                held_out = torch.arange(seen, seen + batch.samples) % HOLD_OUT == HOLD_OUT // 2
                for name, chosen in (("fitted", ~held_out), ("held_out", held_out)):
                    if chosen.any():
                        running[name].update(by_sample[chosen.to(by_sample.device)].flatten(0, 1))
            for name, pieces in stored.items():
                pieces.append(batch.inputs if name == "inputs" else batch.mlp_inputs())
            seen += batch.samples
        if split and running["held_out"].count == 0:
            raise ValueError(
                f"{self.where}: {seen} samples are too few to hold one in {HOLD_OUT} out: give at least "
                f"{HOLD_OUT // 2 + 1}"
            )
        for one in running.values():
            if not torch.isfinite(one.total).all():
                raise ValueError(f"{self.where}: activations are not finite (NaN or infinite); check the weights")
        self._read(running)
        self.known |= {name: torch.cat(pieces) for name, pieces in stored.items()}

    def _read(self, running: dict) -> None:
        known = self.known
        if "norms" in running:
            known["input_norms"] = running["norms"].norms
        if "mlp_norms" in running:
            known["mlp_input_norms"] = running["mlp_norms"].norms
        if "outputs" in running:
            known["output_scatter"] = running["outputs"].scatter
        if "fitted" in running:
            for name in ("fitted", "held_out"):
                known[f"{name}_means"] = running[name].mean
                known[f"{name}_covariance"] = running[name].scatter / running[name].count
            running["inputs"] = running["fitted"].merged(running["held_out"])
        if "inputs" in running:
            inputs = running["inputs"]
            known["input_means"] = inputs.mean
            known["input_variances"] = inputs.diagonal() / inputs.count
            if not inputs.only_diagonal:
                known["input_covariance"] = inputs.scatter / inputs.count

    def _moments(self) -> regression.Moments:
        """Moments of the kept columns' output and the full one."""
        kept, weight, seen = self.known["kept"], self.known["output_weight"], RunningMoments()
        for batch in self.rows():
            kept_output = functional.linear(batch.inputs[:, kept], weight[:, kept])
            seen.update(regression.moments(kept_output, batch.outputs()), len(batch.inputs))
        return seen.moments


class HeadQuantities(Quantities):
    """Of the attention half."""

    weights = ATTENTION_WEIGHTS

    @staticmethod
    def module(layer: nn.Module) -> nn.Module:
        return layer.self_attn

    @staticmethod
    def projection(layer: nn.Module) -> nn.Linear:
        return layer.self_attn.o_proj

    def _constants(self, layer: nn.Module) -> dict:
        self._heads = layer_widths(layer).heads
        return {"head_dim": layer.self_attn.head_dim, "key_value_owner": key_value_owner(layer.self_attn)}

    def _read(self, running: dict) -> None:
        super()._read(running)
        if "contribution_covariance" in self._wanted:
            covariance = self.known["input_covariance"]
            self.known["contribution_covariance"] = heads.covariance_of_contributions(
                covariance, self.known["output_weight"], self._heads
            )

    def keep(self, kept: Int[Tensor, "kept"]) -> None:
        """Say which heads stay, for the recovery."""
        self._kept_heads = kept
        self.known["kept"] = head_columns(kept, self.known["head_dim"])

    def _moments(self) -> regression.Moments:
        """Where the contributions' covariance is known, sums of it."""
        if "contribution_covariance" not in self._wanted:
            return super()._moments()
        covariance, means = self["contribution_covariance"], self["input_means"]
        kept, columns = self._kept_heads, self.known["kept"]
        rows, weight = covariance[:, kept], self.known["output_weight"].to(means)
        return regression.Moments(
            mean_kept=weight[:, columns] @ means[columns],
            mean_full=weight @ means,
            var_kept=rows[:, :, kept].sum((1, 2)),
            var_full=covariance.sum((1, 2)),
            cov=rows.sum((1, 2)),
        )


class ChannelQuantities(Quantities):
    """Of the MLP half."""

    weights = MLP_WEIGHTS

    @staticmethod
    def module(layer: nn.Module) -> nn.Module:
        return layer.mlp

    @staticmethod
    def projection(layer: nn.Module) -> nn.Linear:
        return layer.mlp.down_proj

    def _constants(self, layer: nn.Module) -> dict:
        return {}

    def keep(self, kept: Int[Tensor, "kept"]) -> None:
        """Say which channels stay, for the recovery."""
        self.known["kept"] = kept
