"""The statistics that the parts of a method ask for (methods.STATISTICS), gathered over the calibration tokens.

One pass over the batches sums up all that is wanted, so no activation needs to stay in memory; tests/test_streaming.py
compares with what heads.py, channels.py and regression.py make of all tokens at once.
"""

import torch
from torch import Tensor
from torch.nn import functional

from slimllm_nb import regression
from slimllm_nb.checks import require_finite
from slimllm_nb.covariance import RunningCovariance
from slimllm_nb.heads import covariance_of_contributions
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
        found["contribution_covariance"] = covariance_of_contributions(sigma, sublayer.weight, sublayer.count)
    return found | {"outputs": stored["outputs"]}


def output_moments(sublayer: Sublayer, statistics: dict, columns: Tensor, weight: Tensor) -> regression.Moments:
    """Moments of what the kept columns (kept,) give with this weight (hidden, kept), and of the full output: of heads,
    from the covariance of the inputs; else in another pass over the batches."""
    if not (outputs := statistics["outputs"]):
        means, sigma = statistics["input_means"], statistics["input_covariance"]
        full = sublayer.weight.to(sigma)
        kept = torch.zeros_like(full).index_copy_(1, columns, weight.to(sigma))
        pairs = (kept, full), (kept, kept), (full, full)
        cov, var_kept, var_full = (torch.linalg.vecdot(a @ sigma, b) for a, b in pairs)
        return regression.Moments(kept @ means, full @ means, var_kept, var_full, cov)
    kept = (functional.linear(sublayer.inputs(index, columns), weight) for index in range(len(outputs)))
    return regression.moments(zip(kept, outputs, strict=True))
