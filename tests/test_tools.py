"""The commands of tools/ and the setup script: where they write, what they keep, how they end."""

import json
import subprocess
import sys
from functools import partial

import gguf
import numpy as np
import pytest
import torch

import bench
import export
import reference
import results
import zeroshot
from slimllm_nb import calibration
from slimllm_nb.comparison import Comparison, Protocol
from slimllm_nb.comparison.kept import Kept
from slimllm_nb.comparison.table import Row
from slimllm_nb.evaluation.zeroshot import ZeroShotError
from slimllm_nb.files import ROOT
from slimllm_nb.reproduce import by_kind, kept, load_profile
from slimllm_nb.reproduce.verdicts import NOT_PUBLISHED, NOT_RUN, TITLES
from test_gguf_file import make
from test_ground import NOTEBOOKS


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMLLM_NB_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs" / "embedded"


def test_gguf_keeps_the_dtype_and_looks_where_runs_are(runs, monkeypatch, capsys):
    make("grouped").bfloat16().save_pretrained(runs / "model")
    monkeypatch.setattr(export, "load_tokenizer", lambda folder: None)
    assert export.main(["gguf", "model"]) == 0
    assert f"Written: {runs / 'model.gguf'}" in capsys.readouterr().out
    kinds = {t.tensor_type for t in gguf.GGUFReader(runs / "model.gguf").tensors if len(t.shape) > 1}
    assert kinds == {gguf.GGMLQuantizationType.BF16}
    assert export.main(["gguf", "nothing-here"]) == 2
    assert "Stopped: no model" in capsys.readouterr().err


def test_the_bench_prunes_a_layer_as_it_is_called_for(small_model):
    hidden = torch.randn(2, 10, small_model.config.hidden_size)
    layer, context = small_model.model.layers[0], partial(calibration.layer_context, small_model)
    with torch.no_grad():
        report = bench.pruned_layer(layer, hidden.clone(), context)
    assert len(report["kept_heads"]) == 6 and len(report["kept_channels"]) == 60


def test_serving_makes_groups_even_and_starts_vllm(runs, tmp_path, monkeypatch, capsys):
    assert export.main(["serve", "--vllm", str(tmp_path / "vllm"), "model"]) == 2
    assert "vLLM's command" in (said := capsys.readouterr().err) and "pip install vllm" in said
    vllm = tmp_path / "vllm"
    vllm.write_text("#!/bin/sh\n")
    vllm.chmod(0o755)
    started = []
    monkeypatch.setattr(export.os, "execve", lambda path, command, _: started.append(command[1:]))
    monkeypatch.setattr(export, "load_tokenizer", lambda folder: None)
    monkeypatch.setattr(export, "save_checkpoint", lambda model, _, folder, **__: model.save_pretrained(folder))
    for name in ("grouped", "multi-head"):
        make(name).save_pretrained(runs / name)
        export.main(["serve", "--vllm", str(vllm), name, "--dtype", "float32"])  # which is vLLM's own
    served = [str(runs / "grouped-even"), str(runs / "multi-head")]
    assert started == [["serve", folder, "--trust-remote-code", "--dtype", "float32"] for folder in served]
    assert f"Written: {served[0]}, groups made even: " in capsys.readouterr().out


def test_zeroshot_without_network_says_so(runs, monkeypatch, capsys):
    def offline(*_, **__):
        raise ZeroShotError("the task 'piqa' needs the Hugging Face hub")

    monkeypatch.setattr(zeroshot, "load_model", lambda *_, **__: make("dense"))
    monkeypatch.setattr(zeroshot, "draw_samples", lambda *_: torch.zeros(2, 8, dtype=torch.long))
    monkeypatch.setattr(zeroshot, "zeroshot", offline)
    assert zeroshot.main([]) == 2
    assert capsys.readouterr().err == "Stopped: the task 'piqa' needs the Hugging Face hub\n"
    assert zeroshot.main(["--profile", "nope"]) == 2
    assert "Stopped: unknown profile 'nope'" in capsys.readouterr().err
    assert not runs.exists()


def test_reference_keeps_what_a_run_left(runs, tmp_path, monkeypatch, capsys):
    for name in ("RESULTS", "ZEROSHOT", "ABLATIONS"):
        monkeypatch.setattr(reference, name, tmp_path / name)
    assert reference.main([]) == 1
    assert f"Nothing to keep: {runs} holds no results" in capsys.readouterr().err
    runs.mkdir(parents=True)
    (runs / "results.json").write_text('{"metrics": {"01_first": {"b": 1.0, "a": 2.0}}, "seconds": {}}')
    (runs / "zeroshot.json").write_text('{"rows": []}')
    assert reference.main([]) == 0
    monkeypatch.setattr(kept, "RESULTS", tmp_path / "RESULTS")
    metrics, when = kept.kept_results("embedded")
    assert metrics == {"01_first": {"a": 2.0, "b": 1.0}} and when.startswith("at commit ")
    assert (tmp_path / "ZEROSHOT" / "embedded.json").read_text() == '{"rows": []}'
    assert not (tmp_path / "ABLATIONS").exists()


def test_a_scoreboard_has_every_claim_and_says_what_was_not_run(monkeypatch, tmp_path):
    profile = load_profile("embedded")
    found, when = kept.scoreboard(profile)
    assert when.startswith("at commit ") and {one.notebook for one in found} <= set(NOTEBOOKS)
    assert [list(by_kind(found)), len(found)] == [list(TITLES.values()), sum(map(len, by_kind(found).values()))]
    of_paper = by_kind(found)["What the paper publishes"]
    assert not any(one.paper == "no such row" or one.verdict in (NOT_RUN, NOT_PUBLISHED) for one in of_paper)
    monkeypatch.setattr(kept, "RESULTS", tmp_path)
    again, when = kept.scoreboard(profile)
    assert when.startswith("never") and len(again) == len(found)
    assert {one.verdict for one in again if one.difference is None} == {NOT_RUN}


def test_kept_accuracies_tell_when_they_were_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "ZEROSHOT", tmp_path)
    assert kept.kept_zeroshot("embedded") is None
    content = {"commit": "abc1234", "date": "2026-11-26", "rows": [{"model": "dense"}]}
    (tmp_path / "embedded.json").write_text(json.dumps(content))
    table, when = kept.kept_zeroshot("embedded")
    assert (when, table.to_dict("records")) == ("at commit abc1234 on 2026-11-26", [{"model": "dense"}])


def comparison(*lists) -> Comparison:
    protocol = Protocol(calibrate_on=("news",), judge_on=("news",), num_samples=8, length=16, block_length=16)
    sizes = {"decoder_parameters": 80, "decoder_share": 0.8, "model_parameters": 90, "model_share": 0.9, "seconds": 7}
    rows = [
        Row(method=method, setting="20", seed=seed, perplexity={"news": value}, **sizes)
        for method, values in lists
        for seed, value in enumerate(values)
    ]
    return Comparison(protocol, Row(method="dense", perplexity={"news": 5.0}, **sizes), rows)


def test_a_curve_has_a_point_for_every_setting():
    found = comparison(("slimllm", [10.0, 20.0]), ("other", [5.0, 5.0]))
    smaller = {"setting": "50", "decoder_share": 0.5, "perplexity": {"news": 40.0}}
    found.rows += [row.model_copy(update=smaller) for row in found.rows]
    (axes,) = found.curve().axes
    assert [line.get_ydata().tolist() for line in axes.lines[::3]] == [
        pytest.approx([8**0.5, 8]),
        pytest.approx([1, 8]),
    ]
    assert axes.lines[0].get_xdata().tolist() == pytest.approx([20, 50])
    for row in [found.dense, *found.rows]:
        row.accuracy = {"a": 0.2, "b": 0.4 if row.method == "other" else 0.6}
    (axes,) = found.curve(accuracy=True).axes
    assert axes.get_ylabel() == "zero-shot accuracy" and axes.lines[0].get_ydata()[0] == pytest.approx(0.4)  # dense
    assert [line.get_ydata()[0] for line in axes.lines[1::3]] == pytest.approx([0.4, 0.3])


def test_accuracies_in_percent_beside_slimllms():
    found = comparison(("slimllm", [10.0, 20.0]), ("other one", [5.0, 5.0]))
    for row, value in zip([found.dense, *found.rows], (0.8, 0.5, 0.4, 0.6, 0.5), strict=True):
        row.accuracy = {"a": value - 0.1, "b": value + 0.1}
    head, _, dense, pruned = results.accuracies(found).splitlines()
    assert (head, dense) == ("| decoder left | SlimLLM | other one |", "| 100 % | 80.0 |  |")
    assert pruned.startswith("| 80 % | 45.0 | 55.0, +22.5 % [")  # the root of 1.2 * 1.25


def test_results_are_written_between_two_comments():
    found = comparison(("slimllm", [10.0, 20.0]), ("half", [5.0, 10.0]), ("unclear", [9.0, 22.0]))
    found.rows += comparison(("worse", [120.0, 240.0])).rows
    text = f"before\n{results.START.format('methods')}\nold\n{results.END.format('methods')}\nafter"
    new = {"methods": results.tables(Kept({"methods": found}, {}, {}))}
    written = results.replaced(text, new)
    assert written == results.replaced(written, new)
    lines = written.splitlines()
    assert (lines[0], lines[-1]) == ("before", "after") and "old" not in lines
    assert lines[2] == "8 calibration samples of 16 tokens from other documents of news, 2 seeds. Dense: news 5.0."
    assert lines[-6:-2] == [
        "| `slimllm` | 15.0 ± 7.1 | 80.0% | 7 |",
        "| `half` | 7.5 ± 3.5, **-50.0 %** | 80.0% | 7 |",
        "| `unclear` | 15.5 ± 9.2, -0.5 % | 80.0% | 7 |",
        "| `worse` | 180.0 ± 84.9, **12 times** | 80.0% | 7 |",
    ]
    with pytest.raises(ValueError, match=r"docs/results\.md must hold"):
        results.replaced("nothing", {"methods": ""})


def test_rows_of_two_groups_side_by_side():
    """Over the seeds that both have; the interval of a mean of two by a table of Student's t (12.706)."""
    kept = Kept({"a": comparison(("slimllm", [10.0, 20.0])), "b": comparison(("other", [5.0, 12.0, 7.0]))}, {}, {})
    found = kept.beside({"ours": ("b", "other", "theirs"), "theirs": ("a", "slimllm", None)})
    logs = np.log([0.5, 0.6])
    ends = 100 * np.expm1(logs.mean() + np.array([0, -1, 1]) * 12.706 * logs.std(ddof=1) / 2**0.5)
    assert found.loc[("20", "theirs"), "news"] == "15.0"
    assert found.loc[("20", "ours"), "news"] == "8.0, {:+.1f} % [{:+.1f}, {:+.1f}]".format(*ends)


def test_the_page_of_results_shows_what_is_kept():
    text = results.PAGE.read_text(encoding="utf-8")
    assert text == results.replaced(text, results.sections()), "docs/results.md is stale: make results"


def test_the_newest_gpu_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "GPU", tmp_path)
    assert results.gpu_table() == "*Not yet run on a GPU.*"
    for card, date in (("old", "2026-01-01"), ("new", "2026-02-01")):
        parts = {"equal": {"same heads and channels": 2, "flap": True, "random": False}, "disk": {"failed": "no room"}}
        parts |= {
            "large": {"slimllm": {"seconds": 31.0, "peak GB": 18.54321}},
            "speed": {"seconds in all": 2, "50 %, batch 8, 256 tokens, time": [0.0291, 1.25]},
        }
        content = {"card": card, "GB": 80.0, "driver": "1", "versions": {"torch": "2.15"}, "date": date, "parts": parts}
        (tmp_path / f"{card}.json").write_text(json.dumps(content))
    lines = results.gpu_table().splitlines()
    assert lines[0] == "new (80.0 GB, driver 1), torch 2.15, 2026-02-01."
    assert lines[4:] == [
        "| equal | same heads and channels | 2 |",
        "| equal | random | False |",
        "| disk | failed | no room |",
        "| large | slimllm | seconds: 31, peak GB: 18.54 |",
        "",
        "Speed in float16, how often that of the dense model (above 1: faster; medians, paper Table 3):",
        "",
        "|  | batch 8, 256 tokens, time |",
        "| --- | --- |",
        "| 50 % | 1.25 |",
    ]


@pytest.mark.slow
def test_the_bench_measures_what_it_says(tmp_path, monkeypatch):
    """Its numbers are those of real runs; here of one that takes no time."""
    assert bench.ratio([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}
    # A process of its own: this one may give memory back meanwhile.
    code = "import bench\nprint(bench.seconds_and_peak(lambda: bytearray(b'x') * (200 << 20))[1])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tools", capture_output=True, text=True, check=True)
    assert 195 << 20 < int(done.stdout) < 210 << 20
    monkeypatch.setattr(bench, "RUNS", tmp_path / "bench.json")
    measured = []
    monkeypatch.setitem(bench.PARTS, "growth", lambda: measured.append(1) or {"found": len(measured)})
    for arguments, found in (([], 1), ([], 1), (["--again"], 2)):
        monkeypatch.setattr(sys, "argv", ["bench.py", "--parts", "growth", *arguments])
        assert bench.main() == 0
        assert json.loads(bench.RUNS.read_text())["growth"] == {"found": found}
    monkeypatch.setattr(sys, "argv", ["bench.py", "--parts", "speed"])
    with pytest.raises(SystemExit):
        bench.main()


def test_setup_refuses_an_environment_that_is_none(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    command = ["sh", "tools/setup.sh", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        f"setup: the active environment {tmp_path} has no Python 3.11 to 3.13; activate another one or none at all\n"
    )
    assert [path.name for path in tmp_path.rglob("*")] == ["bin", "python"]
