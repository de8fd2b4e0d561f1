"""The paper's tables, the claims, and how a verdict is reached."""

import dataclasses
import json

import pytest

from slimllm_nb.reproduce import PaperError, claims, judge, load_profile, published, save_results, verdicts
from slimllm_nb.reproduce.claims import Claim
from slimllm_nb.reproduce.verdicts import CLOSE, FAILS, HOLDS, NOT_RUN
from slimllm_nb.settings import read_validated
from test_ground import NOTEBOOKS

PLAIN = {"id": "a", "notebook": "n", "claim": "A is lower", "source": "Table 6", "paper": "1 against 2", "left": "a"}


def verdict(metrics, **changes):
    claim = Claim(**(PLAIN | {"right": "b", "relation": "less", "margin": 0.1} | changes))
    return verdicts._verdict(claim, metrics, "embedded")


@pytest.mark.parametrize(
    ("table", "row", "values"),
    [
        ("table1_llama7b", {"ratio_percent": 20, "tuned": "no", "method": "SlimLLM"}, {"wikitext2_ppl": 15.95}),
        ("table1_llama7b", {"ratio_percent": 0, "method": "LLaMA-7B"}, {"wikitext2_ppl": 12.62, "average": 63.25}),
        ("table1_llama7b", {"ratio_percent": 20, "tuned": "yes", "method": "SlimLLM"}, {"average": 62.41}),
        ("table2_llama2_7b", {"ratio_percent": 50, "tuned": "no", "method": "SlimLLM"}, {"ptb_ppl": 141.06}),
        ("table3_latency", {"ratio": "50%"}, {"params": "3.4B", "prefill_s": 0.1034, "decoding_s": 9.38}),
        ("table4_ablation_strategies_50", {"method": "w/o Greedy search"}, {"WikiText2": 40.89, "PTB": 82.60}),
        ("table4_ablation_strategies_50", {"method": "w/o non-uniform pruning ratio"}, {"WikiText2": 66.37}),
        ("table5_ablation_alpha", {"alpha": 7}, {"WikiText2": 37.89}),
        ("table6_ablation_linear_regression", {"ratio": "50% w/o tune", "method": "w/o LR"}, {"WikiText2": 48.66}),
        ("table7_calibration_count", {"number": 8}, {"WikiText2": 45.98}),
        ("table8_vicuna7b", {"ratio_percent": 50, "tuned": "yes"}, {"wikitext2_ppl": 29.98, "average": 52.60}),
        ("table9_llama13b", {"ratio_percent": 20}, {"wikitext2_ppl": 13.35, "average": 64.21}),
        ("figure2_mean_scale", {"layer_1based": 15}, {"attention_mean_scale": 0.9298}),
    ],
)  # fmt: skip
def test_published_numbers(table, row, values):
    # Copied from the paper's tables by number; Figure 2 was read off its curve.
    frame = published(table)
    for column, value in row.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1
    assert {name: frame.iloc[0][name] for name in values} == values


def test_tables_are_whole():
    rows = {path.stem: len(published(path.stem)) for path in claims.PAPER.glob("*.csv")}
    assert rows == {
        "figure2_mean_scale": 30,  # layers 2 to 31
        "table1_llama7b": 17,
        "table2_llama2_7b": 9,
        "table3_latency": 3,
        "table4_ablation_strategies_50": 4,
        "table5_ablation_alpha": 4,
        "table6_ablation_linear_regression": 4,
        "table7_calibration_count": 6,
        "table8_vicuna7b": 5,
        "table9_llama13b": 3,
    }


def test_an_unknown_table_is_refused():
    with pytest.raises(PaperError, match=r"no published table 'table12'; allowed: .*table1_llama7b"):
        published("table12")


def test_every_claim_belongs_to_a_notebook_and_has_a_source():
    written = read_validated(claims.CLAIMS, claims.Claims, PaperError).root
    assert len(written) >= 15
    assert {claim.notebook for claim in written} == set(NOTEBOOKS)
    assert all(claim.source and claim.paper for claim in written)


@pytest.mark.parametrize(
    ("relation", "left", "expected"),
    [
        ("less", 89, HOLDS), ("less", 91, CLOSE), ("less", 109, CLOSE), ("less", 111, FAILS),
        ("more", 111, HOLDS), ("more", 109, CLOSE), ("more", 91, CLOSE), ("more", 89, FAILS),
        ("within", 110, HOLDS), ("within", 90, HOLDS), ("within", 111, FAILS), ("within", 89, FAILS),
        ("less", float("nan"), FAILS), ("more", float("inf"), FAILS),
    ],
)  # fmt: skip
def test_verdicts_at_and_around_a_margin_of_a_tenth(relation, left, expected):
    assert verdict({"a": left, "b": 100}, relation=relation).verdict == expected


def test_without_a_margin_a_tie_does_not_hold():
    assert verdict({"a": 2.0, "b": 2.0}, margin=0).verdict == FAILS
    assert verdict({"a": 1.999, "b": 2.0}, margin=0).verdict == HOLDS


def test_an_absolute_tolerance():
    assert verdict({"a": 0.22}, right=0.2, relation="within", margin=None, absolute=0.03).verdict == HOLDS
    assert verdict({"a": 0.24}, right=0.2, relation="within", margin=None, absolute=0.03).verdict == FAILS


@pytest.mark.parametrize("metrics", [{"a": 1.0}, {"b": 1.0}, {}])
def test_what_was_not_measured_was_not_run(metrics):
    one = verdict(metrics)
    assert one.verdict == NOT_RUN and one.measured == "-"


def test_only_an_expected_claim_fails_a_run():
    lost = {"a": 3.0, "b": 2.0}
    assert not verdict(lost).fails_run
    assert verdict(lost, expected=["embedded"]).fails_run
    assert verdict({}, expected=["embedded"]).fails_run
    assert not verdict(lost, expected=["llama-7b-20"]).fails_run


def test_the_printed_line_leaves_the_measured_value_out(capsys):
    verdicts.print_verdicts([verdict({"a": 17.31, "b": 42.47})])
    printed = capsys.readouterr().out
    assert "holds" in printed and "1 against 2" in printed and "less by 10 %" in printed
    assert "17.3" not in printed and "42.4" not in printed
    table = verdicts.verdict_table([verdict({"a": 17.31, "b": 42.47})])
    assert table.measured.tolist() == ["17.31 against 42.47"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {id: a}", "notebook: Field required"),
        ("- {id: a, notebook: n, claim: c, source: s, paper: p, left: l, right: 1, relation: less}", "either margin"),
        (
            "- {id: a, notebook: n, claim: c, source: s, paper: p, left: l, right: 1, relation: equal, margin: 0}",
            "less",
        ),
    ],
)
def test_broken_claims_are_refused(text, message, monkeypatch, tmp_path):
    monkeypatch.setattr(claims, "CLAIMS", tmp_path / "claims.yaml")
    claims.CLAIMS.write_text(text)
    with pytest.raises(PaperError, match=message):
        judge("n", {}, load_profile("embedded"))


def test_results_are_saved_whole_or_not_at_all(tmp_path):
    one = verdict({"a": 1.0, "b": 2.0})
    path = save_results(tmp_path, "n", {"a": 1, "b": 2.0}, [one], profile="embedded")
    content = json.loads(path.read_text())
    assert path == tmp_path / "results" / "n.json"
    assert content["metrics"] == {"a": 1.0, "b": 2.0} and content["verdicts"] == [dataclasses.asdict(one)]
    with pytest.raises(PaperError, match="metric c of n is nan"):
        save_results(tmp_path, "n", {"a": 5.0, "c": float("nan")}, [], profile="embedded")
    assert json.loads(path.read_text()) == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("left", "expected"), [(0.8, "one seed: agrees"), (0.95, "inconclusive"), (1.2, "one seed: differs")]
)
def test_one_seed_agrees_or_differs_and_does_not_hold(left, expected):
    one = verdict({"a": left, "b": 1.0}, one_seed=True, expected=["embedded"])
    assert one.verdict == expected
    assert one.fails_run == (expected != "one seed: agrees")
