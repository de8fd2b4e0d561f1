"""The statistics that the parts of a method ask for (methods.STATISTICS), gathered over the calibration tokens.

One pass over the batches sums up all that is wanted, so no activation needs to stay in memory; tests/test_streaming.py
compares with what heads.py, channels.py and regression.py make of all tokens at once.
"""

import torch
from torch import Tensor
from torch.nn import functional

from slimllm_nb import heads, regression
from slimllm_nb.checks import require_finite
from slimllm_nb.covariance import RunningCovariance
from slimllm_nb.pruning.sublayers import Sublayer

HOLD_OUT = 8  # one sample in so many is held out from what a recovery is fitted on, when it asks for that
SPLIT = ("fitted", "held_out")
SUMMED = {  # statistic, "input_means" -> which rows are summed up, and what is read off (RunningCovariance)
    f"{rows.removesuffix('s')}_{what}": (rows, what)
    for rows in ("inputs", "mlp_inputs", "outputs", *SPLIT)
    for what in ("norms", "means", "variances", "covariance", "scatter")
}


def gather(sublayer: Sublayer, wanted: set[str]) -> dict:
    """All that is `wanted`, in one pass over the batches, and what is known before any token is seen. "outputs", batch
    by batch, unless the moments of the outputs follow from a covariance (output_moments).
    Raises: ValueError for activations that are not finite, and for too few samples to hold one out."""
    if split := any(name.startswith(SPLIT) for name in wanted):
        wanted = wanted | {f"{rows}_covariance" for rows in SPLIT}
        if (count := sum(map(len, sublayer.batches))) <= (least := HOLD_OUT // 2):
            says = f"{count} samples are too few to hold one in {HOLD_OUT} out: give at least {least + 1}"
            raise ValueError(f"{sublayer.where}: {says}")
    if split or "contribution_covariance" in wanted:
        wanted = wanted | {"input_covariance", "input_means"}
    asked = {name: SUMMED[name] for name in SUMMED if name in wanted}
    full = {rows for rows, what in asked.values() if what in ("covariance", "scatter")}
    sums = {rows: RunningCovariance(diagonal=rows not in full) for rows, _ in asked.values()}
    stored = {"inputs": [], "mlp_inputs": [], "outputs": []}
    for index, batch in enumerate(sublayer.batches):
        rows = {"inputs": sublayer.inputs(index)}
        if "output_scatter" in wanted or "contribution_covariance" not in wanted:
            rows["outputs"] = functional.linear(rows["inputs"], sublayer.weight)
        if wanted & {"mlp_inputs", "mlp_input_norms"}:
            rows["mlp_inputs"] = sublayer.mlp_inputs(index)
        if split:
            samples = torch.arange(len(batch), device=batch.device) + sum(map(len, sublayer.batches[:index]))
            ours = (samples % HOLD_OUT == HOLD_OUT // 2).repeat_interleave(batch.shape[1])
            rows["held_out"] = rows["inputs"][ours]
        for name in [one for one in sums if one in rows]:  # inputs come first
            sums[name].update(rows[name], sums["inputs"].shift if name == "held_out" else None)
        for name in stored.keys() & rows.keys() & (wanted | {"outputs"}):
            stored[name].append(rows[name])
    if split:
        sums["fitted"] = sums["inputs"].without(sums["held_out"])
    for one in sums.values():
        require_finite(one.squares, sublayer.where)
    found = {name: getattr(sums[rows], what) for name, (rows, what) in asked.items()} | sublayer.constants
    found |= {name: torch.cat(stored[name]) for name in ("inputs", "mlp_inputs") if name in wanted}
    if "contribution_covariance" in wanted:
        sigma = found["input_covariance"]
        found["contribution_covariance"] = heads.covariance_of_contributions(sigma, sublayer.weight, sublayer.count)
    return found | {"outputs": stored["outputs"]}


def output_moments(sublayer: Sublayer, statistics: dict, columns: Tensor, weight: Tensor | None) -> regression.Moments:
    """Moments of what the kept columns (kept,) give and of the full output: of heads, from the covariance of their
    contributions; else in another pass. weight: a new one for the kept columns (hidden, kept); None: their own."""
    own = sublayer.weight
    if weight is None and "contribution_covariance" in statistics:
        kept, means = columns[:: sublayer.size] // sublayer.size, statistics["input_means"]
        found = heads.kept_and_full(statistics["contribution_covariance"], kept[None])
        (cov, var_kept, var_full), full = (one[:, 0] for one in found), own.to(means)
        return regression.Moments(full[:, columns] @ means[columns], full @ means, var_kept, var_full, cov)
    batches, kept = range(len(sublayer.batches)), own[:, columns] if weight is None else weight
    full = statistics["outputs"] or (functional.linear(sublayer.inputs(index), own) for index in batches)
    of_kept = (functional.linear(sublayer.inputs(index, columns), kept) for index in batches)
    return regression.moments(zip(of_kept, full, strict=True))
