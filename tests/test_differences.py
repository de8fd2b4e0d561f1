"""Differences between methods over seeds, and the claims that are judged by them."""

import json
import math
from dataclasses import astuple

import numpy as np
import pytest

from slimllm_nb.comparison.plan import load_plan
from slimllm_nb.reproduce import claims, differences, judge, load_claims, load_profile, verdicts
from slimllm_nb.reproduce.claims import Claim, PaperError
from slimllm_nb.reproduce.differences import difference, kept_difference
from test_ground import NOTEBOOKS

SWEPT = {"id": "a", "notebook": "n", "claim": "A is lower", "source": "Table 1", "paper": "1 against 2"}
SWEPT |= {"swept": {"group": "methods", "setting": "20", "method": "flap"}, "expected": ["embedded"]}


@pytest.fixture
def keep(tmp_path, monkeypatch):
    """Write a kept sweep: {method: perplexities by seed}, each on two corpora, the second ten times the first."""
    monkeypatch.setattr(differences, "KEPT", tmp_path)

    def write(**methods):
        rows = [
            {"method": method, "setting": "20", "seed": seed, "perplexity": {"news": value, "hamlet": 10 * value}}
            for method, values in methods.items()
            for seed, value in enumerate(values)
        ]
        (tmp_path / "embedded.json").write_text(json.dumps({"groups": {"methods": {"rows": rows}}}))

    return write


def test_a_difference_by_hand():
    found = difference([1.2, 1.5, 1.1, 1.3])
    logs = np.log([1.2, 1.5, 1.1, 1.3])
    half = 3.182446 * np.std(logs, ddof=1) / 2  # Student's t at 97.5 % with three degrees of freedom, from a table
    assert found.change == pytest.approx(100 * (np.exp(logs.mean()) - 1))
    assert (found.low, found.high) == pytest.approx(tuple(100 * (np.exp(logs.mean() + s * half) - 1) for s in (-1, 1)))
    assert (found.seeds, found.sign) == (4, 1)
    assert str(found) == f"{found.change:+.1f} % [{found.low:+.1f}, {found.high:+.1f}]"
    turned = difference([1 / ratio for ratio in (1.2, 1.5, 1.1, 1.3)])
    assert turned.sign == -1 and difference([0.9, 1.1, 1.0]).sign == 0


def test_one_seed_tells_nothing():
    found = difference([0.5])
    assert found.change == pytest.approx(-50) and math.isnan(found.low) and found.sign == 0
    assert str(found) == "-50.0 %"


def test_the_mean_over_corpora_seed_by_seed(keep):
    keep(slimllm=[10.0, 20.0, 40.0], flap=[12.0, 30.0, 44.0], half=[5.0, 11.0])
    found = kept_difference("embedded", "methods", "20", "flap")
    assert astuple(found) == pytest.approx(astuple(difference([1.2, 1.5, 1.1])))
    found = kept_difference("embedded", "methods", "20", "half")
    assert astuple(found) == pytest.approx(astuple(difference([0.5, 0.55])))  # the seeds that both have
    for what in (("other", "methods", "20", "flap"), ("embedded", "heads", "20", "flap")):
        assert kept_difference(*what) is None
    assert kept_difference("embedded", "methods", "50", "flap") is None
    assert kept_difference("embedded", "methods", "20", "wanda_sp") is None


def test_against_slimllm_under_another_protocol(keep, tmp_path):
    keep(slimllm=[10.0, 20.0, 40.0])
    content = json.loads((tmp_path / "embedded.json").read_text())
    few = [
        row | {"perplexity": {"news": 1.5 * row["perplexity"]["news"]}} for row in content["groups"]["methods"]["rows"]
    ]
    content["groups"]["few"] = {"rows": few[1:]}
    (tmp_path / "embedded.json").write_text(json.dumps(content))
    found = kept_difference("embedded", "few", "20", "slimllm", "methods")
    # Perplexity on the second corpus is ten times that on the first, which is the only one of the other group.
    assert found.change == pytest.approx(100 * (1.5 / math.sqrt(10) - 1)) and found.seeds == 2
    assert kept_difference("embedded", "few", "20", "slimllm", "nothing") is None
    assert kept_difference("embedded", "few", "20", "slimllm").change == pytest.approx(0)


@pytest.mark.parametrize(
    ("flap", "expected"),
    [
        ([12.0, 24.5, 47.0], verdicts.HOLDS),
        ([8.0, 16.2, 33.0], verdicts.FAILS),
        ([9.0, 22.0, 39.0], verdicts.CLOSE),
        ([12.0], verdicts.CLOSE),
        ([], verdicts.NOT_RUN),
    ],
)
def test_verdicts_of_claims_about_methods(flap, expected, keep):
    keep(slimllm=[10.0, 20.0, 40.0], flap=flap)
    one = verdicts._verdict(Claim(**SWEPT), {}, "embedded")
    assert one.verdict == expected
    assert one.fails_run == (expected != verdicts.HOLDS)
    assert one.measured == (f"flap: {one.difference}, {len(flap)} seeds" if flap else "-")
    assert one.tolerance == "95 % interval"
    assert verdicts._verdict(Claim(**SWEPT), {}, "llama-7b-20").verdict == verdicts.NOT_RUN


def test_a_claim_is_measured_in_one_way(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "CLAIMS", tmp_path / "claims.yaml")
    for text, message in (
        ("swept: {group: a, setting: b, method: c}, left: d", "give either swept, or left"),
        ("left: a", "give left, right and relation, or swept"),
        ("swept: {group: a}", "swept.setting: Field required"),
    ):
        claims.CLAIMS.write_text("- {id: a, notebook: n, claim: c, source: s, paper: p, " + text + "}")
        with pytest.raises(PaperError, match=message):
            judge("n", {}, load_profile("embedded"))


def test_every_claim_about_methods_is_in_the_plan():
    profile, plan = load_profile("embedded"), load_plan()
    swept = [claim.swept for name in NOTEBOOKS for claim in load_claims(name, profile) if claim.swept]
    assert len(swept) >= 14
    for one in swept:
        assert one.method in plan[one.group].named_methods() and one.setting in profile.settings, one
        assert one.against is None or one.against in plan, one
