"""The sweep of ablations: its parts against literal versions, a plan, an interruption, and what is kept."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import literal_methods as literal
import slimllm_nb
from conftest import make_small_model
from slimllm_nb.comparison import ablations
from slimllm_nb.comparison import plan as plans
from slimllm_nb.comparison.ablations import measure, tasks
from slimllm_nb.comparison.kept import collect, dumped, kept_ablations
from slimllm_nb.comparison.plan import PlanError, load_plan
from slimllm_nb.methods import as_method
from slimllm_nb.pruning import prune
from slimllm_nb.reproduce import differences
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


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Where the kept rows lie."""
    monkeypatch.setattr(differences, "KEPT", tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    return tmp_path / "kept" / "tiny.json"


def keep(name, plan, kept, again=()):
    kept.write_text(dumped(collect(name, plan, kept, again)))
    return json.loads(kept.read_text())


@pytest.mark.slow
def test_what_is_measured_is_kept_and_not_measured_again(name, plan, pruned, kept, tmp_path):  # noqa: F811
    measured = [row for task in tasks(name, plan) for row in measure(task)]
    assert len(measured) == 2 * 2 * 3 + 2 and len(pruned) == len(measured)
    content = keep(name, plan, kept)
    assert [len(group["rows"]) for group in content["groups"].values()] == [12, 2]
    assert content["groups"]["few samples"]["protocol"]["num_samples"] == 9
    assert kept.read_text().count('\n    {"method"') == 14
    found = kept_ablations(name, kept)
    rows = [row for group in found.groups.values() for row in group.rows]
    assert rows == found.rows == measured and all(row.date for row in rows)
    assert str(found) == f"14 rows, measured at commit {rows[0].commit} on {rows[0].date}"
    assert found.questions["few samples"] == "How many?" and len(found.groups["rivals"].differences()) == 2 * 2 * 2
    assert found.joined("rivals", "rivals").rows == rows[:12]
    with pytest.raises(ValueError, match="group few samples has another protocol than rivals"):
        found.joined("rivals", "few samples")
    shutil.rmtree(tmp_path / "tiny")  # an edit of the code would have the same effect
    assert tasks(name, plan) == [] and keep(name, plan, kept) == content
    assert [str(one) for one in tasks(name, plan, again=["few samples"])] == [
        f"few samples, {key} %, seed 0" for key in ("20", "50")
    ]
    assert len(pruned) == len(measured)
    assert kept_ablations(name, tmp_path / "nothing.json") is None


@pytest.mark.slow
def test_what_the_plan_changes_is_measured(name, plan, pruned, kept, tmp_path):  # noqa: F811
    for task in tasks(name, plan):
        measure(task)
    before = keep(name, plan, kept)["groups"]["rivals"]["rows"]
    shutil.rmtree(tmp_path / "tiny")
    pruned.clear()
    plan.write_text(PLAN.replace("head_selection: lowest", "channel_selection: lowest").replace("seeds: 2", "seeds: 3"))
    plans.group_and_bench.cache_clear()
    waiting = tasks(name, plan)
    assert [(one.setting, one.seed) for one in waiting] == [(key, seed) for seed in range(3) for key in ("20", "50")]
    measure(waiting[0])
    assert pruned == ["no search"]  # SlimLLM's and Wanda-sp's rows are kept
    rows = keep(name, plan, kept)["groups"]["rivals"]["rows"]
    assert [row for row in rows if row["method"] != "no search"] == [
        one for one in before if one["method"] != "no search"
    ]
    assert [(row["setting"], row["seed"]) for row in rows if row["method"] == "no search"] == [("20", 0)]


@pytest.mark.slow
def test_a_group_is_measured_again(name, plan, pruned, kept, tmp_path, capsys):  # noqa: F811
    command = ["--profile", name, "--plan", str(plan), "--workers", "1"]
    for task in tasks(name, plan):
        measure(task)
    content = keep(name, plan, kept)
    for group in content["groups"].values():
        for row in group["rows"]:
            row["seconds"] = -1.0  # as it was measured on another day
    kept.write_text(dumped(content))
    shutil.rmtree(tmp_path / "tiny" / "comparison")
    assert ablations.main([*command, "--again", "few samples"]) == 0
    rows = json.loads((tmp_path / "tiny" / "ablations.json").read_text())["groups"]
    assert all(row["seconds"] == -1.0 for row in rows["rivals"]["rows"])
    assert all(row["seconds"] > 0 for row in rows["few samples"]["rows"])
    capsys.readouterr()
    shutil.rmtree(tmp_path / "tiny")
    kept.unlink()
    assert ablations.main([*command, "--minutes", "0"]) == 0
    assert "Left, for the same command again: rivals, " in capsys.readouterr().out


@pytest.mark.slow
def test_a_kept_row_measured_again():
    """Another one at each version; less than 1 % off."""
    plans.group_and_bench.cache_clear()
    plans._first.clear()
    found = [row for row in kept_ablations().groups["8 samples"].rows if row.method == "slimllm"]
    row = found[int(hashlib.sha256(slimllm_nb.__version__.encode()).hexdigest(), 16) % len(found)]
    bench = plans.group_and_bench("embedded", plans.PLAN, "8 samples")[1]
    again = bench.row(as_method("slimllm"), row.setting, row.seed, None)
    assert again.decoder_parameters == row.decoder_parameters
    assert again.perplexity == pytest.approx(row.perplexity, rel=0.01)


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
    assert ablations.main(["--profile", name, "--plan", str(plan), "--again", "few"]) == 2
    assert "no group few in" in capsys.readouterr().err
