"""The statistics that the parts of a method ask for (methods.STATISTICS), gathered over the calibration tokens.

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
from slimllm_nb.checks import require_finite
from slimllm_nb.llama import other_columns
from slimllm_nb.pruning.sublayers import Sublayer

WIDE = 512  # columns from which on a batch is summed in float32, an error of 1e-6 of the variances; batches in float64
HOLD_OUT = 8  # one sample in so many is held out from what a recovery is fitted on, when it asks for that
SUMMED = {  # statistic -> which rows are summed up, and what is read off (RunningCovariance)
    "input_norms": ("inputs", "norms"),
    "input_means": ("inputs", "mean"),
    "input_variances": ("inputs", "variance"),
    "input_covariance": ("inputs", "covariance"),
    "mlp_input_norms": ("mlp_inputs", "norms"),
    "output_scatter": ("outputs", "scatter"),
    "fitted_means": ("fitted", "mean"),
    "fitted_covariance": ("fitted", "covariance"),
    "held_out_means": ("held_out", "mean"),
    "held_out_covariance": ("held_out", "covariance"),
}
SPLIT = {name for name, (rows, _) in SUMMED.items() if rows in ("fitted", "held_out")}
COVARIANCES = {"input_covariance", "contribution_covariance"} | SPLIT


class RunningCovariance:
    """Mean and centred scatter matrix (rows - mean)'(rows - mean) over all rows seen; diagonal: only its diagonal."""

    def __init__(self, diagonal: bool = False) -> None:
        self.count, self.diagonal = 0, diagonal

    def update(self, rows: Float[Tensor, "tokens width"], shift: Float[Tensor, "width"] | None = None) -> None:
        """shift: any value near the mean, float64; None: the first rows' mean."""
        precise = rows.shape[1] < WIDE or rows.dtype == torch.float64
        dtype = torch.float64 if precise else torch.float32
        if self.count == 0:
            self.shift = rows.mean(0, dtype=torch.float64).to(dtype).double() if shift is None else shift
            self.sum = torch.zeros_like(self.shift)
            self.squares = self.sum.new_zeros(rows.shape[1:] if self.diagonal else rows.shape[1:] * 2)
        self.count += len(rows)
        shifted = rows.to(dtype) - self.shift.to(dtype)
        self.sum += shifted.sum(0)
        self.squares += torch.linalg.vecdot(shifted, shifted, dim=0) if self.diagonal else shifted.T @ shifted

    def without(self, some: "RunningCovariance") -> "RunningCovariance":
        """Over the rows that were seen here and not there; both have the same shift."""
        rest = RunningCovariance(self.diagonal)
        rest.count, rest.shift, rest.sum = self.count - some.count, self.shift, self.sum - some.sum
        rest.squares = self.squares - some.squares
        return rest

    @property
    def mean(self) -> Float[Tensor, "width"]:
        return self.shift + self.sum / self.count

    @property
    def scatter(self) -> Float[Tensor, "width width"]:
        return self.squares.addr(self.sum, self.sum, alpha=-1 / self.count)

    @property
    def covariance(self) -> Float[Tensor, "width width"]:
        return self.scatter / self.count

    @property
    def variance(self) -> Float[Tensor, "width"]:
        squares = self.squares if self.diagonal else self.squares.diagonal()
        return (squares - self.sum.square() / self.count) / self.count

    @property
    def norms(self) -> Float[Tensor, "width"]:
        """L2 norms of the columns."""
        return (self.count * (self.variance.clamp_min(0) + self.mean.square())).sqrt()


def gather(sublayer: Sublayer, wanted: set[str]) -> dict:
    """All that is `wanted`, in one pass over the batches, and what is known before any token is seen.

    Beside it "outputs", batch by batch, unless the moments of the outputs follow from a covariance (output_moments).
    Raises: ValueError for activations that are not finite, and for too few samples to hold one out.
    """
    if wide := bool(wanted & COVARIANCES):
        wanted = wanted | {"input_covariance", "input_means"}
    asked = {name: SUMMED[name] for name in SUMMED if name in wanted}
    full = {"outputs", "inputs"} if wide else {"outputs"}
    sums = {rows: RunningCovariance(diagonal=rows not in full) for rows, _ in asked.values()}
    held_out = RunningCovariance() if wanted & SPLIT else None
    stored = {"inputs": [], "mlp_inputs": [], "outputs": []}
    for index, batch in enumerate(sublayer.batches):
        rows = {"inputs": sublayer.inputs(index)}
        if wanted & {"mlp_inputs", "mlp_input_norms"}:
            rows["mlp_inputs"] = sublayer.mlp_inputs(index)
        if "output_scatter" in wanted or "contribution_covariance" not in wanted:
            rows["outputs"] = functional.linear(rows["inputs"], sublayer.weight)
        for name in sums.keys() & rows.keys():
            sums[name].update(rows[name])
        if held_out is not None:
            samples = torch.arange(len(batch), device=batch.device) + sum(map(len, sublayer.batches[:index]))
            ours = (samples % HOLD_OUT == HOLD_OUT // 2).repeat_interleave(batch.shape[1])
            held_out.update(rows["inputs"][ours], sums["inputs"].shift)
        for name in rows.keys() & (wanted | {"outputs"}):
            stored[name].append(rows[name])
    if held_out is not None:
        if held_out.count == 0:
            count, least = sum(map(len, sublayer.batches)), HOLD_OUT // 2 + 1
            says = f"{count} samples are too few to hold one in {HOLD_OUT} out: give at least {least}"
            raise ValueError(f"{sublayer.where}: {says}")
        sums |= {"held_out": held_out, "fitted": sums["inputs"].without(held_out)}
    for one in sums.values():
        require_finite(one.squares, sublayer.where)
    found = {name: getattr(sums[rows], what) for name, (rows, what) in asked.items()} | sublayer.constants
    found |= {name: torch.cat(stored[name]) for name in ("inputs", "mlp_inputs") if name in wanted}
    if "contribution_covariance" in wanted:
        contributions = heads.covariance_of_contributions
        found["contribution_covariance"] = contributions(found["input_covariance"], sublayer.weight, sublayer.count)
    return found | {"outputs": stored["outputs"]}


def output_moments(
    sublayer: Sublayer, statistics: dict, columns: Int[Tensor, "kept"], weight: Float[Tensor, "hidden kept"] | None
) -> regression.Moments:
    """Moments of what the kept columns give and of the full output: of heads, from the covariance of their
    contributions; else in another pass over the batches. weight: a new one for the kept columns; None: their own."""
    own = sublayer.weight
    if "contribution_covariance" in statistics and weight is None:
        heads_kept, means = columns[:: statistics["head_dim"]] // statistics["head_dim"], statistics["input_means"]
        found = heads.kept_and_full(statistics["contribution_covariance"], heads_kept[None])
        (cov, var_kept, var_full), full = (one[:, 0] for one in found), own.to(means)
        return regression.Moments(full[:, columns] @ means[columns], full @ means, var_kept, var_full, cov)
    kept, others = own[:, columns] if weight is None else weight.to(own), other_columns(columns, own.shape[1])
    fewer = weight is None and len(others) < len(columns)  # then what is pruned is cheaper to compute

    def outputs(index: int) -> tuple[Tensor, Tensor]:
        stored = statistics["outputs"]
        full = stored[index] if stored else functional.linear(sublayer.inputs(index), own)
        if fewer:
            return full - functional.linear(sublayer.inputs(index, others), own[:, others]), full
        return functional.linear(sublayer.inputs(index, columns), kept), full

    return regression.moments(outputs(index) for index in range(len(sublayer.batches)))
