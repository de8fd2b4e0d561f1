"""What the parts of a method ask for, gathered over the tokens of one half of a decoder layer: what nobody asks for is
not computed, and everything is computed once.

What heads.head_covariance, channels.channel_importance and regression.fit take whole is gathered here batch by batch
(streaming.py), so that no activation need stay in memory; tests/test_streaming.py ties both together.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from slimllm_nb import heads, regression
from slimllm_nb.chunks import in_chunks
from slimllm_nb.llama import head_columns, key_value_owner, layer_widths, other_columns
from slimllm_nb.methods import Method, Part
from slimllm_nb.pruning.rows import Iteration, Rows
from slimllm_nb.pruning.streaming import RunningMoments, RunningNorms, RunningScatter

HOLD_OUT = 8  # one sample in so many is held out from what a recovery is fitted on, when it asks for that


def needed(parts: Iterable[Part]) -> set[str]:
    """All that these parts ask for."""
    return {name for part in parts for name in part.needs}


def require_finite(values: Tensor, where: str, what: str = "activations") -> None:
    """Errors: ValueError that names the layer and its half when a value, or a sum of them, is not finite."""
    # A sum is finite only where all of its terms are: one pass over them.
    if not torch.isfinite(values.sum(dtype=torch.promote_types(values.dtype, torch.float32))):
        raise ValueError(f"{where}: {what} are not finite (NaN or infinite); check the weights and the dtype")


@dataclass(frozen=True)
class Sum:
    """A statistic that is summed over the tokens of one batch after another, and the quantities that it gives."""

    gives: frozenset[str]
    make: Callable[[], RunningNorms | RunningScatter]
    rows: Callable[[Rows], Tensor]  # what of a batch goes into it


def held_out(samples: range) -> Tensor:
    """Which of these samples are held out: one in HOLD_OUT."""
    return torch.tensor([index % HOLD_OUT == HOLD_OUT // 2 for index in samples])


FITTED, HELD_OUT = ({f"{name}_covariance", f"{name}_means"} for name in ("fitted", "held_out"))
COVARIANCE = {"input_covariance", "contribution_covariance"}
SUMS = {
    "norms": Sum(frozenset({"input_norms"}), RunningNorms, lambda batch: batch.inputs),
    "mlp_norms": Sum(frozenset({"mlp_input_norms"}), RunningNorms, lambda batch: batch.mlp_inputs()),
    "outputs": Sum(frozenset({"output_scatter"}), RunningScatter, lambda batch: batch.outputs()),
    "fitted": Sum(frozenset(FITTED | HELD_OUT), RunningScatter, lambda batch: batch.of_samples(~held_out(batch.index))),
    "held_out": Sum(
        frozenset(FITTED | HELD_OUT), RunningScatter, lambda batch: batch.of_samples(held_out(batch.index))
    ),
    "inputs": Sum(frozenset(COVARIANCE), RunningScatter, lambda batch: batch.inputs),
    "variances": Sum(
        frozenset({"input_means", "input_variances"}),
        partial(RunningScatter, diagonal=True),
        lambda batch: batch.inputs,
    ),
}


def sums_for(wanted: Collection[str]) -> list[str]:
    """Which of SUMS give all that is wanted, none of them twice: a covariance gives means and variances as well, and
    what is fitted and what is held out make the whole."""
    names = [name for name, one in SUMS.items() if one.gives & set(wanted)]
    if "fitted" in names:
        return [name for name in names if name not in ("inputs", "variances")]
    return [name for name in names if name != "variances" or "inputs" not in names]


class Quantities:
    """The quantities of one half by name, each computed when it is first asked for.

    wanted: all names that will be asked for, so that one iteration over the batches gathers them together. where: for
    errors. tokens: of all batches.
    """

    half: str  # the half's name in a decoder layer
    weights: Mapping[str, str]  # quantity (without "_weight") -> projection; "output" is where the half ends

    def __init__(
        self,
        layer: nn.Module,
        rows: Iteration,
        wanted: Collection[str],
        where: str,
        tokens: int,
        **known,
    ):
        self.rows, self.where = rows, where
        self.module = layer.get_submodule(self.half)
        self.projection = self.module.get_submodule(self.weights["output"])
        self._wanted = set(wanted)
        self._tokens = tokens
        self._full_outputs = self._kept_outputs = None  # of all tokens, once they are known
        self.known = {**self._constants(layer), **known}
        for name, projection in self.weights.items():
            self.known[f"{name}_weight"] = self.module.get_submodule(projection).weight

    @classmethod
    def gradient_names(cls, parts: Iterable[Part]) -> list[str]:
        """Which of a layer's parameters these parts ask the gradients of."""
        wanted = needed(parts)
        return [cls.parameter(name) for name in cls.weights if f"{name}_gradient" in wanted]

    @classmethod
    def gradients(cls, of_layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradients of a layer's parameters, as far as they are known, as quantities."""
        names = {f"{name}_gradient": cls.parameter(name) for name in cls.weights}
        return {name: of_layer[parameter] for name, parameter in names.items() if parameter in of_layer}

    @classmethod
    def parameter(cls, name: str) -> str:
        """What the weight "output", "query", ... is called in a layer."""
        return f"{cls.half}.{cls.weights[name]}.weight"

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
        running = {name: SUMS[name].make() for name in sums_for(wanted)}
        stored = {name: [] for name in ("inputs", "mlp_inputs") if name in wanted}
        if "outputs" in running:
            self._full_outputs = self._empty_outputs()
        for batch in self.rows():
            for name, one in running.items():
                rows = SUMS[name].rows(batch)
                if len(rows):
                    one.update(rows)
                if name == "outputs":
                    self._full_outputs[batch.tokens] = rows
            for name, pieces in stored.items():
                pieces.append(batch.inputs if name == "inputs" else batch.mlp_inputs())
        if "held_out" in running and running["held_out"].count == 0:
            raise ValueError(
                f"{self.where}: {batch.index.stop} samples are too few to hold one in {HOLD_OUT} out: give at least "
                f"{HOLD_OUT // 2 + 1}"
            )
        for one in running.values():
            require_finite(one.total, self.where)
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
        inputs = running.get("inputs", running.get("variances"))
        if "fitted" in running:
            for name in ("fitted", "held_out"):
                known[f"{name}_means"] = running[name].mean
                known[f"{name}_covariance"] = running[name].scatter / running[name].count
            inputs = running["fitted"].merged(running["held_out"])
        if inputs is not None:
            known["input_means"] = inputs.mean
            known["input_variances"] = inputs.diagonal() / inputs.count
            if not inputs.only_diagonal:
                known["input_covariance"] = inputs.scatter / inputs.count

    def _constants(self, layer: nn.Module) -> dict:
        """What is known before any token is seen."""
        return {}

    def _empty_outputs(self) -> Tensor:
        """Room for what leaves the output projection: as much as the hidden states once more."""
        weight = self.known["output_weight"]
        return weight.new_empty(self._tokens, weight.shape[0])

    def _moments(self) -> regression.Moments:
        """Moments of the kept columns' output and the full one. The kept outputs stay in memory, in the place of the
        full ones where these are known."""
        seen = RunningMoments()
        known = self._full_outputs is not None
        held = self._full_outputs if known else self._empty_outputs()
        for batch in self.rows():
            kept_output, full = self._kept_and_full(batch, held[batch.tokens] if known else None)
            for some, of_full in in_chunks(kept_output, full):
                seen.update(regression.moments(some, of_full), len(some))
            held[batch.tokens] = kept_output
        self._full_outputs, self._kept_outputs = None, held
        return seen.moments

    def _kept_and_full(self, batch: Rows, full: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the kept columns give, and what all give: full, where that is known. Then of the two halves that make
        the whole the smaller one is enough."""
        if len(self._gone) == 0:
            full = batch.outputs() if full is None else full
            return full, full
        if full is None:
            kept_output = self._through(batch, "kept")
            return kept_output, kept_output + self._through(batch, "gone")
        if len(self._gone) < len(self.known["kept"]):
            return full - self._through(batch, "gone"), full
        return self._through(batch, "kept"), full

    def _through(self, batch: Rows, which: str) -> Tensor:
        """What the columns that are "kept", or "gone", give."""
        columns = self.known["kept"] if which == "kept" else self._gone
        if which not in self._cut:
            self._cut[which] = self.known["output_weight"][:, columns]
        return functional.linear(batch.columns(columns), self._cut[which])

    def kept_output(self, batch: Rows) -> Tensor:
        """What the kept columns give, without a bias."""
        if self._kept_outputs is not None:
            return self._kept_outputs[batch.tokens]
        if len(self._gone) == 0:
            return batch.outputs() if self._full_outputs is None else self._full_outputs[batch.tokens]
        return self._through(batch, "kept")

    def keep(self, kept: Int[Tensor, "kept"]) -> None:
        """Say which heads or channels stay, for the recovery."""
        self._keep_columns(kept)

    def _keep_columns(self, kept: Int[Tensor, "kept"]) -> None:
        self.known["kept"] = kept
        self._gone, self._cut = other_columns(kept, self.known["output_weight"].shape[1]), {}


class HeadQuantities(Quantities):
    """Of the attention half."""

    half = "self_attn"
    weights: ClassVar = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}

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
        self._kept_heads = kept
        self._keep_columns(head_columns(kept, self.known["head_dim"]))

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

    half = "mlp"
    weights: ClassVar = {"gate": "gate_proj", "up": "up_proj", "output": "down_proj"}


def gradient_names(method: Method) -> list[str]:
    """Which of a layer's parameters this method's parts ask the gradients of."""
    heads, channels = method.head_parts, method.channel_parts
    if method.scores_dense_model:
        heads, channels = [*heads, method.head_score], [*channels, method.channel_score]
    return HeadQuantities.gradient_names(heads) + ChannelQuantities.gradient_names(channels)
