"""The paper's rows as claims: the tables judged by their own numbers, and with one number spoilt."""

from itertools import product

import pytest

from slimllm_nb.reproduce import judge, load_claims, load_profile, published
from slimllm_nb.reproduce.claims import NO_ROW, TUNED, PaperError, tolerances
from slimllm_nb.reproduce.profiles import PROFILES
from slimllm_nb.reproduce.verdicts import FAILS, HOLDS, NOT_PUBLISHED, NOT_RUN

NOTEBOOK = "06_evaluation"
HUB = sorted(path.stem for path in PROFILES.glob("*.yaml") if path.stem != "embedded")
ROWS = [name for name in HUB if load_profile(name).published]
TASKS = ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]


def table_as_measured(profile) -> dict[str, float]:
    """The published table, written down as notebook 06 would save it had it measured just that."""
    table, metrics = published(profile.published.table), {}
    table = table[table.tuned == "no"].set_index(["ratio_percent", "method"])
    keys = {"dense": (0, profile.published.dense)} | {key: (int(key), "SlimLLM") for key in profile.settings}
    for key, row in keys.items():
        for corpus in profile.evaluation.corpora:
            metrics[f"ppl_{key}{'' if key == 'dense' else '_slimllm'}_{corpus}"] = table.loc[row, f"{corpus}_ppl"]
        for task in [*TASKS, "average"]:
            metrics[f"acc_{key}_{task}"] = table.loc[row, task] / 100
    if profile.published.latency:
        seconds = published("table3_latency").set_index("ratio")
        for name, key in product(("prefill", "decoding"), profile.settings):
            metrics[f"speedup_{name}_{key}"] = seconds.loc["0%", f"{name}_s"] / seconds.loc[f"{key}%", f"{name}_s"]
    return metrics | {f"model_share_removed_{key}": v for key, v in profile.published.parameters_removed.items()}


@pytest.mark.parametrize("name", ROWS)
def test_the_published_table_holds_and_what_is_fine_tuned_was_not_run(name):
    profile = load_profile(name)
    verdicts = {one.id: one for one in judge(NOTEBOOK, table_as_measured(profile), profile)}
    own = {key: one for key, one in verdicts.items() if key.startswith(f"{name}-")}
    timed = 2 if profile.published.latency else 0
    assert len(own) == 2 * (len(profile.evaluation.corpora) + len(TASKS) + 1) + 1 + timed
    assert {one.verdict for one in own.values()} == {HOLDS} and bool(timed) == name.startswith("llama-7b")
    tuned = [one for one in judge(TUNED, {}, profile) if one.id.startswith(f"{name}-")]
    assert len(tuned) == (len(profile.evaluation.corpora) + len(TASKS) + 1 if profile.tune else 0)
    assert all("-tuned-" in one.id and one.verdict == NOT_RUN and not one.expected for one in tuned)
    assert not any(one.fails_run for one in verdicts.values())


@pytest.mark.parametrize("name", ROWS)
def test_a_number_that_is_spoilt_fails_its_row_and_no_other(name):
    profile = load_profile(name)
    metrics = table_as_measured(profile)
    for spoilt in (one for one in metrics if not one.startswith("speedup")):  # another card fails no run
        changed = metrics[spoilt] * 1.06 if spoilt.startswith("ppl") else metrics[spoilt] + 0.016
        failing = [one for one in judge(NOTEBOOK, metrics | {spoilt: changed}, profile) if one.fails_run]
        assert [one.verdict for one in failing] == [FAILS], spoilt
        assert {claim.id: claim.left for claim in load_claims(NOTEBOOK, profile)}[failing[0].id] == spoilt


@pytest.mark.parametrize("name", sorted(set(HUB) - set(ROWS)))
def test_where_nothing_is_published_every_verdict_says_so(name):
    profile = load_profile(name)
    claims = [one for one in load_claims(NOTEBOOK, profile) if one.id.startswith(name)]
    judged = [one for one in judge(NOTEBOOK, {one.left: 0.5 for one in claims}, profile) if one.id.startswith(name)]
    assert judged and {(one.verdict, one.paper, one.measured) for one in judged} == {(NOT_PUBLISHED, NO_ROW, "0.5")}


def test_tolerances_are_those_that_were_promised():
    found = {kind: one.margin or one.absolute for kind, one in tolerances().items()}
    promised = {"perplexity": 0.05, "accuracy": 0.015, "average": 0.01, "parameters": 0.005, "speedup": 0.15}
    assert found == promised | {"scale": 0.02}
    assert all(len(one.why) > 20 for one in tolerances().values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"table": "table12"}, "no published table .*table12.*allowed: .*table1_llama7b"),
     ({"method": "SlimmerLLM"}, "table1_llama7b has no row of 'SlimmerLLM' at 20 %")],
)  # fmt: skip
def test_a_table_or_row_that_is_not_there(changes, message):
    profile = load_profile("llama-7b-20")
    profile = profile.model_copy(update={"published": profile.published.model_copy(update=changes)})
    with pytest.raises(PaperError, match=message):
        load_claims(NOTEBOOK, profile)


@pytest.mark.parametrize("name", HUB)
def test_profiles_of_the_hub(name):
    profile = load_profile(name)
    assert profile.device == "auto" and profile.zeroshot.tasks == TASKS and len(profile.revision) == 40
    assert (profile.calibration.num_samples, profile.calibration.length) == (32, 128)
    assert profile.evaluation.block_length == 128 and profile.evaluation.corpora[0] == "wikitext2"
    layers = {"llama-13b": 40, "smollm2-135m": 30}.get(name.removesuffix("-20").removesuffix("-50"), 32)
    assert all(one.pruned_layers < layers for one in profile.settings.values())


def test_a_corpus_is_not_calibrated_and_evaluated_on(tmp_path):
    text = (PROFILES / "llama-7b-20.yaml").read_text().replace("corpus: bookcorpus", "corpus: wikitext2")
    (tmp_path / "llama-7b-20.yaml").write_text(text)
    with pytest.raises(ValueError, match="wikitext2 is calibrated on and evaluated on"):
        load_profile(str(tmp_path / "llama-7b-20.yaml"))


def test_figure_2_is_judged_layer_by_layer_for_its_own_model():
    metrics = {"attention_mean_scale_off_figure": 0.019, "mlp_mean_scale_off_figure": 0.021}
    names = {"attention-figure-2": HOLDS, "mlp-figure-2": FAILS}
    found = {one.id: one.verdict for one in judge("04_regression_recovery", metrics, load_profile("llama-7b-50"))}
    assert {name: found[name] for name in names} == names
    others = judge("04_regression_recovery", metrics, load_profile("llama-7b-20"))
    assert not {one.id for one in others} & names.keys()
