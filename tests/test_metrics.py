"""Metrics of notebook 06 from its tables."""

import pandas as pd
import pytest

from slimllm_nb.reproduce.metrics import accuracy_metrics, speed_metrics


def test_accuracies_worked_by_hand():
    columns = ["model", "task", "accuracy", "standard error", "chance"]
    rows = [("dense", "a", 0.5, 0.05, 0.25), ("dense", "b", 0.8, 0.1, 0.5)]
    rows += [("20", "a", 0.45, 0.04, 0.25), ("20", "b", 0.75, 0.04, 0.5)]
    rows += [("50", "a", 0.3, 0.03, 0.25), ("50", "b", 0.6, 0.03, 0.5)]
    found = accuracy_metrics(pd.DataFrame(rows, columns=columns), "20", "50")
    assert found["acc_dense_a"] == 0.5 and found["acc_20_average"] == pytest.approx(0.6)
    assert found["errors_above_chance_dense"] == pytest.approx(3.0)  # of 5 and 3 the lower
    # Means 0.60 and 0.45; the standard error of a mean of two is half the root of the sum of squares.
    assert found["errors_20_above_50"] == pytest.approx(0.15 / ((2 * 0.04**2 + 2 * 0.03**2) ** 0.5 / 2))
    assert accuracy_metrics(pd.DataFrame(columns=columns), "20", "50") == {}


def test_speed_ups_at_the_published_batch_sizes():
    columns = ["model", "batch", "measure", "median", "lowest", "highest", "speed-up"]
    measures = ["time to first token (s)", "tokens per second"]
    rows = [
        (model, batch, measure, 1.0, 1.0, 1.0, batch + number)
        for model in ("dense", "20")
        for batch in (1, 8)
        for number, measure in enumerate(measures)
    ]
    assert speed_metrics(pd.DataFrame(rows, columns=columns), 8) == {"speedup_prefill_20": 1, "speedup_decoding_20": 9}
