"""The sweep of ablations: its parts against literal versions, a plan, an interruption, and what is kept."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import literal_methods as literal
from conftest import make_small_model
from slimllm_nb.comparison import ablations
from slimllm_nb.comparison import plan as plans
from slimllm_nb.comparison.ablations import measure
from slimllm_nb.comparison.kept import collect, dumped, kept_ablations, restore
from slimllm_nb.comparison.plan import PlanError, load_plan, tasks
from slimllm_nb.methods import as_method
from slimllm_nb.pruning import prune
from test_comparison import folder, profile, pruned  # noqa: F401  fixtures

PLAN = """
- name: rivals
  question: Which is better?
  seeds: 2
  methods: [wanda_sp, {name: no search, head_selection: lowest}]
- {name: few samples, question: 'How many?', seeds: 1, num_samples: 9, methods: []}
"""


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    return tmp_path / "plan.yaml"


@pytest.fixture
def name(profile, folder):  # noqa: F811
    plans.group_and_bench.cache_clear()
    plans._first.clear()
    return str(folder / "tiny.yaml")


# The parts, literally.

PIECES = ["direction_only", "activation_norms_only", "feature_space_without_gate_and_up", "gate_and_up_only"]


def feature_space_length(scatter, weight):
    """I^d of a channel: its row of W_down in every direction of the output, weighted by how much the output varies."""
    variances, directions = np.linalg.eigh(scatter)
    weights = 1 / (1 + np.exp(-variances / variances.mean()))
    return [
        np.sqrt(sum((weights[d] * (directions[:, d] @ column)) ** 2 for d in range(len(weights))))
        for column in weight.T
    ]


def channel_scores(mlp, x, a):
    """All pieces of eq. 8 for every channel."""
    gate, up, down = (literal.numpy(one.weight) for one in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    y = a @ down.T
    centred = y - y.mean(0)
    n, norms = np.sqrt((x**2).sum(0)), np.sqrt((a**2).sum(0))
    direction = np.array(feature_space_length(centred.T @ centred, down))
    others = np.array(
        [np.sqrt(((gate[j] * n) ** 2).sum()) + np.sqrt(((up[j] * n) ** 2).sum()) for j in range(len(gate))]
    )
    return {
        "direction_only": direction,
        "activation_norms_only": norms,
        "feature_space_without_gate_and_up": norms * direction,
        "gate_and_up_only": others,
    }


def scaled(x, weight, columns):
    """Every output by least squares on the kept part of it alone."""
    tokens = x.reshape(-1, x.shape[-1])
    rows = []
    for row in weight:
        kept, full = tokens[:, columns] @ row[columns], tokens @ row
        rows.append(np.linalg.lstsq(kept[:, None], full, rcond=None)[0][0] * row[columns])
    return np.array(rows), None


@torch.no_grad()
@pytest.mark.parametrize("key_value_heads", [8, 2])
@pytest.mark.parametrize("score", PIECES)
def test_a_piece_of_the_channel_score_alone(score, key_value_heads, generator):
    model = make_small_model(key_value_heads, hidden_size=24, intermediate_size=30, num_hidden_layers=3)
    input_ids = torch.randint(0, 101, (16, 10), generator=generator)
    method = {"head_score": "magnitude", "head_selection": "lowest", "recovery": "scale"}
    method |= {"channel_score": score, "channel_selection": "lowest"}
    settings = {"pruning_ratio": 0.4, "pruned_layers": 3, "alpha": 0.0, "progress": False}
    pruned_model, report = prune(model, input_ids, **settings, method=method)
    counts = [(one.heads - len(one.kept_heads), one.channels - len(one.kept_channels)) for one in report.layers]
    expected, kept_heads, kept_channels = literal.literal_method(
        model,
        input_ids,
        counts,
        lambda attention, x, number: literal.highest(literal.magnitude_heads(attention, x), number),
        lambda mlp, x, a, number: literal.highest(channel_scores(mlp, x, a)[score], number),
        scaled,
    )
    assert [one.kept_heads for one in report.layers] == kept_heads
    assert [one.kept_channels for one in report.layers] == kept_channels
    x, y = pruned_model(input_ids).logits, expected(input_ids).logits
    assert (x - y).abs().max() <= 1e-5 * y.abs().max()
    assert all(layer.self_attn.o_proj.bias is None for layer in pruned_model.model.layers)


def test_an_alpha_of_ones_own():
    known = {
        "similarity": torch.tensor([0.5, 0.9, 0.7]).double(),
        "pruning_ratio": 0.3,
        "pruned_layers": 3,
        "alpha": 4.0,
    }
    own = as_method({"allocation": {"name": "similarity_with_alpha", "sharpness": 4.0}}).allocation(known)
    assert torch.equal(own, as_method("slimllm").allocation(known))
    flat = as_method({"allocation": {"name": "similarity_with_alpha", "sharpness": 0.0}}).allocation(known)
    assert flat.tolist() == pytest.approx([0.3] * 3)


# The plan.


def test_the_plan_of_the_project():
    plan = load_plan()
    headline = plan["methods"]
    assert headline.seeds == 5 and {"flap", "wanda_sp", "obs_ridge"} <= set(headline.named_methods())
    assert plan["goal"].num_samples == 128 and plan["goal"].seeds == 5
    assert all(group.seeds >= 3 for group in plan.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("wanda_sp", "wanda"), r"plan\.yaml: group rivals: unknown method 'wanda'; allowed: flap"),
        (("seeds: 2", "seeds: 0"), r"plan\.yaml is not valid:\n  0\.seeds: .* \(found 0\)"),
        (("name: few samples", "name: rivals"), "two groups have one name"),
    ],
)
def test_a_wrong_plan(change, message, plan):
    plan.write_text(PLAN.replace(*change))
    with pytest.raises(PlanError, match=message):
        load_plan(plan)


def test_what_is_measured_is_kept_and_known_again(name, plan, pruned, tmp_path):  # noqa: F811
    measured = [row for task in tasks(name, plan) for row in measure(task)]
    assert len(measured) == 2 * 2 * 3 + 2 and len(pruned) == len(measured)
    content = collect(name, plan)
    assert [len(group["rows"]) for group in content["groups"].values()] == [12, 2]
    assert content["groups"]["few samples"]["protocol"]["num_samples"] == 9
    text = dumped(content)
    assert json.loads(text) == json.loads(json.dumps(content)) and text.count('\n    {"method"') == 14
    (tmp_path / "kept.json").write_text(text)
    kept = kept_ablations(name, plan, tmp_path / "kept.json")
    assert (kept.measured, kept.confirmed, kept.total) == (14, 0, 14)
    rows = [row for group in kept.groups.values() for row in group.rows]
    assert [row.model_copy(update={"recipe": ""}) for row in rows] == measured
    assert kept.questions["few samples"] == "How many?"
    assert len(kept.groups["rivals"].differences()) == 2 * 2 * 2
    assert kept.joined("rivals", "rivals").rows == rows[:12]
    with pytest.raises(ValueError, match="group few samples has another protocol than rivals"):
        kept.joined("rivals", "few samples")
    assert len(pruned) == len(measured)  # nothing was measured again


def test_the_first_seeds_of_every_group(name, plan):
    found = [(task.group, task.setting, task.seed) for task in tasks(name, plan, seeds=1)]
    assert found == [(group, setting, 0) for group in ("rivals", "few samples") for setting in ("20", "50")]


def test_rows_that_todays_code_would_not_make_are_counted(name, plan, tmp_path):
    for task in tasks(name, plan, ["rivals"]):
        measure(task)
    (tmp_path / "kept.json").write_text(dumped(collect(name, plan)))
    plan.write_text(PLAN.replace("head_selection: lowest", "channel_selection: lowest"))
    plans.group_and_bench.cache_clear()
    kept = kept_ablations(name, plan, tmp_path / "kept.json")
    assert (kept.measured, kept.confirmed, kept.total) == (8, 0, 12)
    assert kept_ablations(name, plan, tmp_path / "nothing.json") is None


@pytest.mark.slow
def test_a_part_of_a_sweep_replaces_a_part_of_what_is_kept(name, plan, pruned, tmp_path):  # noqa: F811
    path = tmp_path / "kept.json"
    for task in tasks(name, plan):
        measure(task)
    path.write_text(dumped(collect(name, plan, kept=path)))
    content = json.loads(path.read_text())
    for group in content["groups"].values():
        for row in group["rows"]:
            row["made_by"], row["recipe"], row["seconds"] = "f" * 64, "e" * 64, -1.0
    path.write_text(dumped(content))  # as code of another day made them
    for file in (tmp_path / "tiny" / "comparison").glob("*.json"):
        file.unlink()
    first = next(iter(tasks(name, plan)))
    new = measure(first)
    path.write_text(dumped(collect(name, plan, kept=path)))
    kept = kept_ablations(name, plan, path)
    assert (kept.measured, kept.confirmed, kept.total) == (3, 3, 14)  # the other seed of this setting is confirmed
    found = {(row.setting, row.seed, row.method): row for row in kept.groups["rivals"].rows}
    again = [found[first.setting, first.seed, row.method] for row in new]
    assert [row.model_copy(update={"recipe": ""}) for row in again] == new
    assert sum(row.seconds == -1.0 for row in found.values()) == 9


def nothing(row):
    pass


def rounding(row):
    row["perplexity"] = {corpus: value * (1 + 2e-5) for corpus, value in row["perplexity"].items()}


def another_number(row):
    if (row["method"], row["seed"]) == ("wanda_sp", 0):
        row["perplexity"]["theirs"] *= 1.001


def another_size(row):
    if (row["method"], row["setting"]) == ("wanda_sp", "20"):
        row["decoder_parameters"] += 1


def older_still(row):
    if row["seed"]:
        row["recipe"] = "d" * 64


CONFIRMED = [(nothing, 6), (rounding, 6), (another_number, 4), (another_size, 5), (older_still, 0)]


@pytest.mark.slow
def test_kept_rows_are_confirmed_by_another_seed(name, plan, tmp_path):
    """Two seeds are kept, as older code measured them; today's has measured the first. Of the six rows of the second,
    those are confirmed whose first seed came out the same and was kept by the same code."""
    path = tmp_path / "kept.json"
    for task in tasks(name, plan, ["rivals"]):
        measure(task)
    fresh = collect(name, plan, kept=path)
    for file in (tmp_path / "tiny" / "comparison").glob("*.json"):
        if json.loads(file.read_text())["seed"]:
            file.unlink()
    for change, expected in CONFIRMED:
        content = json.loads(json.dumps(fresh))
        for row in content["groups"]["rivals"]["rows"]:
            row["made_by"], row["recipe"] = "f" * 64, "e" * 64
            change(row)
        path.write_text(dumped(content))
        for _ in range(2):  # what is confirmed stays so
            path.write_text(dumped(collect(name, plan, kept=path)))
            kept = kept_ablations(name, plan, path)
            assert (kept.measured, kept.confirmed, kept.total) == (6, expected, 12), change.__name__


@pytest.mark.slow
def test_a_sweep_takes_what_is_kept(name, plan, pruned, tmp_path):  # noqa: F811
    path = tmp_path / "kept.json"
    rows = [row for task in tasks(name, plan) for row in measure(task)]
    path.write_text(dumped(collect(name, plan)))
    for file in (tmp_path / "tiny" / "comparison").glob("*.json"):
        file.unlink()
    before = len(pruned)
    restore(name, plan, tmp_path / "nothing.json")
    restore(name, plan, path)
    assert [row for task in tasks(name, plan) for row in measure(task)] == rows
    assert len(pruned) == before


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on(name, plan, pruned, tmp_path):  # noqa: F811
    """As a user sees it: Ctrl-C, and no row is measured twice."""
    command = [sys.executable, "-m", "slimllm_nb.comparison.ablations", "--profile", name, "--plan", str(plan)]
    rows = tmp_path / "tiny" / "comparison"
    running = subprocess.Popen([*command, "--workers", "1"], stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list(rows.glob("*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 130
    assert "Interrupted; the same command goes on from here." in running.stderr.read()
    before = len(list(rows.glob("*.json")))
    assert 3 <= before < 14
    assert len([row for task in tasks(name, plan) for row in measure(task)]) == 14
    assert len(pruned) == 14 - before


def test_the_command_refuses_what_it_does_not_know(name, plan, capsys):
    assert ablations.main(["--profile", name, "--plan", str(plan), "--groups", "rivls"]) == 2
    assert "no group rivls" in capsys.readouterr().err
    assert ablations.main(["--profile", name, "--plan", str(plan), "--seeds", "0"]) == 2
    assert "--seeds is 0; allowed: at least 1" in capsys.readouterr().err
