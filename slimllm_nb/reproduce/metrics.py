"""Metrics from tables of accuracies and of speed, by the names that the claims ask for."""

from typing import TYPE_CHECKING

from slimllm_nb.evaluation.speed import FIRST_TOKEN, TOKENS_PER_SECOND

if TYPE_CHECKING:
    import pandas


def accuracies(table: "pandas.DataFrame") -> dict[str, float]:
    """Of a table of zero-shot accuracies (model, task, accuracy): each one, and every model's average over the
    tasks."""
    averages = {f"acc_{name}_average": one.accuracy.mean() for name, one in table.groupby("model")}
    return {f"acc_{row.model}_{row.task}": row.accuracy for row in table.itertuples()} | averages


def accuracy_metrics(accuracy: "pandas.DataFrame", mildest: str, strongest: str) -> dict[str, float]:
    """accuracies() of a table that has standard error and chance, too; by how many standard errors the dense model is
    above chance on its worst task, and the mildest setting above the strongest on average. Tasks without a standard
    error (one question) decide neither."""
    metrics = accuracies(accuracy)
    dense = accuracy[(accuracy.model == "dense") & (accuracy["standard error"] > 0)]
    if len(dense):
        metrics["errors_above_chance_dense"] = ((dense.accuracy - dense.chance) / dense["standard error"]).min()
    if len(dense) and mildest != strongest:
        # The mean over tasks, and its standard error from those of the tasks: other questions would give another mean.
        both = [accuracy[accuracy.model == name] for name in (mildest, strongest)]
        error = sum((one["standard error"] ** 2).sum() for one in both) ** 0.5 / len(both[0])
        metrics[f"errors_{mildest}_above_{strongest}"] = (both[0].accuracy.mean() - both[1].accuracy.mean()) / error
    return metrics


def speed_metrics(measured: "pandas.DataFrame", batch: int) -> dict[str, float]:
    """Of speed.measure_speed's table: the speed-ups that the paper publishes, of the first token at batch 1 and of
    decoding at `batch`."""
    wanted = {(1, FIRST_TOKEN): "prefill", (batch, TOKENS_PER_SECOND): "decoding"}
    return {
        f"speedup_{wanted[row.batch, row.measure]}_{row.model}": row[-1]
        for row in measured[measured.model != "dense"].itertuples()
        if (row.batch, row.measure) in wanted
    }
