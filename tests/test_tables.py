"""The paper's tables, number by number: each has one verdict, and its page shows what a run left."""

import json
import re

import pytest

from slimllm_nb.comparison.plan import load_plan, plan_of
from slimllm_nb.reproduce import load_profile, published
from slimllm_nb.reproduce.claims import PAPER
from slimllm_nb.reproduce.profiles import PROFILES
from slimllm_nb.reproduce.tables import FIGURE, SWEPT, _sweeps, table_verdicts, write_tables
from test_published import table_as_measured

LABELS = {"ratio_percent", "tuned", "method", "ratio", "params", "alpha", "number", "layer_1based"}
OTHERS = {"LLM-Pruner", "LoRAPrune", "LoRAP"}
NAMES = sorted(path.stem for path in PROFILES.glob("*.yaml"))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMLLM_NB_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def test_every_number_of_the_paper_has_a_verdict_or_is_another_methods(runs):
    judged = [one.cell for name in NAMES for one in table_verdicts(load_profile(name))]
    missing = set()
    for path in PAPER.glob("*.csv"):
        for number, row in published(path.stem).iterrows():
            if row.get("method") not in OTHERS and row.get("ratio") != "0%":  # the dense model's seconds are the unit
                cells = {(path.stem, number, column) for column in row.dropna().index if column not in LABELS}
                missing |= cells - set(judged)
    assert not missing
    twice = {cell for cell in judged if judged.count(cell) > 1}
    assert all(row == 0 for _, row, _ in twice)  # the dense model, of which two profiles ask


def test_the_pages_show_what_runs_left(runs, tmp_path):
    """As if a run had measured what the paper publishes, and a sweep one row of it."""
    for name in ("llama-7b-20", "llama-7b-50"):
        (runs / name).mkdir(parents=True)
        results = {"metrics": {"06_evaluation": table_as_measured(load_profile(name))}}
        (runs / name / "results.json").write_text(json.dumps(results))
    row = {"seed": 0, "method": "slimllm", "perplexity": {"wikitext2": 37.9, "ptb": 80.0}, "accuracy": {"a": 0.5}}
    (runs / "llama-7b-50" / "ablations.json").write_text(json.dumps({"groups": {"alpha": {"rows": [row]}}}))
    scales = [{"index": one - 1, "attention_mean_scale": 1.5, "mlp_mean_scale": None} for one in range(1, 4)]
    (runs / "llama-7b-50" / "model").mkdir()
    (runs / "llama-7b-50" / "model" / "pruning_report.json").write_text(json.dumps({"layers": scales}))
    files = write_tables(tmp_path)
    assert list(files) == ["Figure 2", *(f"Table {number}" for number in range(1, 10))]
    pages = {title: (tmp_path / file).read_text() for title, file in files.items()}
    assert '<td>37.89<br><span class="holds">37.89</span>' in pages["Table 1"]
    assert "2.10 times as fast</span>" in pages["Table 3"] and pages["Table 3"].count(">holds<") == 6
    assert pages["Table 1"].count(">holds<") == 3 * 10 and pages["Table 1"].count(">not run<") == 2 * 10
    assert re.search(r"37\.89<br><span class=\"holds\">37\.9<.*67\.68<br><span class=\"fails\">80<", pages["Table 5"])
    assert "50.00 %" in pages["Table 5"] and "make ablations PROFILE=llama-7b-50" in pages["Table 5"]
    assert pages["Figure 2"].count("does not hold") == 2  # layer 0 is not in the figure
    assert "lmsys/vicuna-7b-v1.3: make reproduce PROFILE=vicuna-7b-20" in pages["Table 8"]
    assert "make reproduce PROFILE=llama-7b" not in pages["Table 3"]


def test_the_plans_measure_what_the_tables_ask_for():
    for table, answers in _sweeps().items():
        for name, group, method in answers.values():
            planned = load_plan(plan_of(name))[group]
            assert method in planned.named_methods() and planned.accuracy and planned.seeds == 1, (table, group)
    counts = {
        row: load_plan(plan_of(one[0]))[one[1]].num_samples
        for row, one in _sweeps()["table7_calibration_count"].items()
    }
    assert {int(row): count or 32 for row, count in counts.items()} == {row: row for row in (1, 4, 8, 16, 32, 64)}
    assert load_profile("llama-7b-50").calibration.num_samples == 32
    assert set(published(FIGURE)["layer_1based"]) <= set(range(1, 33)) and set(SWEPT) <= set(
        published("table5_ablation_alpha")
    )
