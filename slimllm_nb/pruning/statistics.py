"""The statistics that the parts of a method ask for (methods.QUANTITIES), gathered over the calibration tokens.

One pass over the batches sums up all that is wanted, so no activation needs to stay in memory; tests/test_streaming.py
compares with what heads.py, channels.py and regression.py make of all tokens at once. Sums are float64, around the
first batch's mean: a naive sum of squares loses the variance of an output whose mean is large, and LLaMA has such
outputs (shifted data; Chan, Golub and LeVeque, 1983).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from slimllm_nb import heads, regression
from slimllm_nb.llama import other_columns
from slimllm_nb.pruning.sublayers import Sublayer, require_finite

WIDE = 512  # columns from which on a batch is summed in float32, an error of 1e-6 of the variances; batches in float64
HOLD_OUT = 8  # one sample in so many is held out from what a recovery is fitted on, when it asks for that
SPLIT = {f"{which}_{what}" for which in ("fitted", "held_out") for what in ("covariance", "means")}
COVARIANCE = {"input_covariance", "contribution_covariance"}
DIAGONAL = {"input_norms", "input_means", "input_variances"}


class RunningCovariance:
    """Mean and centred scatter matrix (rows - mean)'(rows - mean) over all rows seen; diagonal: only its diagonal."""

    def __init__(self, diagonal: bool = False) -> None:
        self.count, self.diagonal = 0, diagonal

    def update(self, rows: Float[Tensor, "tokens width"]) -> None:
        precise = rows.shape[1] < WIDE or rows.dtype == torch.float64
        dtype = torch.float64 if precise else torch.float32
        if self.count == 0:
            self.shift = rows.mean(0, dtype=torch.float64).to(dtype).double()  # any value near the mean will do
            self.sum = torch.zeros_like(self.shift)
            self.squares = self.sum.new_zeros(rows.shape[1:] if self.diagonal else rows.shape[1:] * 2)
        self.count += len(rows)
        shifted = rows.to(dtype) - self.shift.to(dtype)
        self.sum += shifted.sum(0)
        self.squares += torch.linalg.vecdot(shifted, shifted, dim=0) if self.diagonal else shifted.T @ shifted

    @property
    def mean(self) -> Float[Tensor, "width"]:
        return self.shift + self.sum / self.count

    @property
    def scatter(self) -> Tensor:
        """(width, width), or its diagonal."""
        if self.diagonal:
            return self.squares - self.sum.square() / self.count
        return self.squares.addr(self.sum, self.sum, alpha=-1 / self.count)

    @property
    def variance(self) -> Float[Tensor, "width"]:
        squares = self.squares if self.diagonal else self.squares.diagonal()
        return (squares - self.sum.square() / self.count) / self.count

    @property
    def norms(self) -> Float[Tensor, "width"]:
        """L2 norms of the columns."""
        return (self.count * (self.variance.clamp_min(0) + self.mean.square())).sqrt()

    def __add__(self, other: "RunningCovariance") -> "RunningCovariance":
        """Over the rows that either has seen (Chan, Golub and LeVeque, 1983)."""
        both, step = RunningCovariance(), other.mean - self.mean
        both.count = self.count + other.count
        both.shift, both.sum = self.mean + step * (other.count / both.count), torch.zeros_like(step)
        between = torch.outer(step, step) * (self.count * other.count / both.count)
        both.squares = self.scatter + other.scatter + between
        return both


def gather(sublayer: Sublayer, wanted: set[str]) -> dict:
    """All that is `wanted` and summed over the tokens, in one pass over the batches.

    Beside it "outputs", batch by batch, unless output moments follow from a covariance (see output_moments).
    Raises: ValueError for activations that are not finite, and for too few samples to hold one out.
    """
    full, sums = bool(wanted & (SPLIT | COVARIANCE)), {}
    stored = {name: [] for name in ("inputs", "mlp_inputs", "outputs")}

    def add(name: str, rows: Tensor, diagonal: bool = False) -> None:
        if len(rows):
            sums.setdefault(name, RunningCovariance(diagonal)).update(rows)

    for index, batch in enumerate(sublayer.batches):
        inputs = sublayer.inputs(index)
        if wanted & SPLIT:
            samples = torch.arange(len(batch), device=batch.device) + sum(map(len, sublayer.batches[:index]))
            held_out = (samples % HOLD_OUT == HOLD_OUT // 2).repeat_interleave(batch.shape[1])
            add("fitted", inputs[~held_out])
            add("held_out", inputs[held_out])
        elif wanted & (COVARIANCE | DIAGONAL):
            add("input", inputs, diagonal=not full)
        if wanted & {"mlp_inputs", "mlp_input_norms"}:
            add("mlp_input", rows := sublayer.mlp_inputs(index), diagonal=True)
            stored["mlp_inputs"] += [rows] if "mlp_inputs" in wanted else []
        stored["inputs"] += [inputs] if "inputs" in wanted else []
        if not full or "output_scatter" in wanted:
            stored["outputs"].append(functional.linear(inputs, sublayer.weight))
        if "output_scatter" in wanted:
            add("output", stored["outputs"][-1])
    for one in sums.values():
        require_finite(one.squares, sublayer.where)
    found = {name: torch.cat(stored[name]) for name in ("inputs", "mlp_inputs") if name in wanted}
    return found | {"outputs": stored["outputs"]} | _read(sums, sublayer, wanted)


def _read(sums: dict[str, RunningCovariance], sublayer: Sublayer, wanted: set[str]) -> dict[str, Tensor]:
    found = {}
    if wanted & SPLIT:
        if "held_out" not in sums:
            raise ValueError(
                f"{sublayer.where}: {sum(map(len, sublayer.batches))} samples are too few to hold one in {HOLD_OUT} "
                f"out: give at least {HOLD_OUT // 2 + 1}"
            )
        for name in ("fitted", "held_out"):
            found[f"{name}_means"] = sums[name].mean
            found[f"{name}_covariance"] = sums[name].scatter / sums[name].count
        sums["input"] = sums["fitted"] + sums["held_out"]
    if (one := sums.get("input")) is not None:
        found |= {"input_means": one.mean, "input_variances": one.variance, "input_norms": one.norms}
        if not one.diagonal:
            found["input_covariance"] = one.scatter / one.count
    if "mlp_input" in sums:
        found["mlp_input_norms"] = sums["mlp_input"].norms
    if "output" in sums:
        found["output_scatter"] = sums["output"].scatter
    if "contribution_covariance" in wanted:
        found["contribution_covariance"] = heads.covariance_of_contributions(
            found["input_covariance"], sublayer.weight, sublayer.count
        )
    return found


def output_moments(
    sublayer: Sublayer, statistics: dict, columns: Int[Tensor, "kept"], weight: Float[Tensor, "hidden kept"] | None
) -> regression.Moments:
    """Moments of what the kept columns give and of the full output: from the covariance of the inputs where that was
    gathered, else in another pass over the batches. weight: a new one for the kept columns; None: their own."""
    own, means = sublayer.weight, statistics.get("input_means")
    if "contribution_covariance" in statistics and weight is None:
        heads_kept = columns[:: statistics["head_dim"]] // statistics["head_dim"]
        cov, var_kept, var_full = heads.kept_and_full(statistics["contribution_covariance"], heads_kept)
        full = own.to(means)
        return regression.Moments(full[:, columns] @ means[columns], full @ means, var_kept, var_full, cov)
    kept = own[:, columns] if weight is None else weight
    if "input_covariance" in statistics:
        return regression.moments_from_covariance(means, statistics["input_covariance"], columns, kept, own)
    others = other_columns(columns, own.shape[1])
    fewer = weight is None and len(others) < len(columns)  # then what is pruned is cheaper to compute

    def kept_output(index: int, full: Tensor) -> Tensor:
        if fewer:
            return full - functional.linear(sublayer.inputs(index, others), own[:, others])
        return functional.linear(sublayer.inputs(index, columns), kept.to(own))

    pairs = ((kept_output(index, full), full) for index, full in enumerate(statistics["outputs"]))
    return regression.running_moments(pairs)
