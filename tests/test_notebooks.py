"""The committed notebooks, run again: the same text in the cells that are compared, metrics within a tolerance.

nbval compares text to the letter, so the cells it checks print no measured number; those are compared here, in the
result file that the notebook wrote, with data/results. Each notebook runs once, which is most of this suite's time.
`make reference` takes the results of `make reproduce` as the new reference.
"""

import json
from fnmatch import fnmatch
from itertools import product
from pathlib import Path

import nbformat
import pytest

from slimllm_nb import sources
from slimllm_nb.reproduce import judge, load_claims, load_profile
from slimllm_nb.reproduce.check import run_nbval
from slimllm_nb.reproduce.kept import kept_results
from test_ground import NOTEBOOKS, ROOT

REFERENCE, _ = kept_results("embedded")
SECONDS_PER_CELL = 1200
FEWEST_COMPARED = 4

# How far a metric may be from its reference: the first pattern that fits its name, relative, absolute, and why.
# Another machine rounds sums differently, and of two heads or channels that are nearly tied the other one may go.
TOLERANCES = [
    ("first_layer_ratio_*", 0, 0, "0 for a layer that is not pruned"),
    ("last_layer_ratio_*", 0, 0, "0 for a layer that is not pruned"),
    ("*_ratio_*", 1e-3, 0, "follows from the dense model's similarities alone: no choice in it"),
    ("*_share_left_*", 0, 0.003, "counts of weights; a key/value head that goes or stays is 0.07 % of the decoder"),
    ("*_share_removed_*", 0, 0.003, "the same"),
    ("target_missed_by", 0, 0.0005, "half a channel of the last pruned layer"),
    ("ppl_dense_*", 1e-3, 0, "no choice in it"),
    ("ppl_50_no_regression_*", 0.2, 0, "what went is not made up for, so that a changed choice tells"),
    ("ppl_50_*", 0.05, 0, "a few nearly tied heads or channels, in 28 layers one after the other"),
    ("ppl_*", 0.02, 0, "a few nearly tied heads or channels"),
    ("acc_*", 0, 0, "kept as data"),
    ("errors_*", 1e-9, 0, "from what is kept as data"),
    ("change_*", 1e-9, 0, "from what is kept as data"),
    ("live_row_off_by", 0, 0.01, "how far a row measured here is from the kept one"),
    ("live_loss_*", 0.02, 0, "a few nearly tied heads or channels"),
    ("similarity_*", 0.01, 0, "a few nearly tied heads"),
    ("*error_*", 0.02, 0, "a few nearly tied heads or channels"),
    ("*_mean_scale", 0, 0.01, "a few nearly tied heads or channels"),
    ("*_mean_scale_off", 0, 0.03, "the same in the one layer that is farthest"),
    ("active_shared_*", 0, 0.005, "a few nearly tied channels of 768"),
    ("exchanged_*", 0, 0.01, "a few nearly tied channels of 1,536"),
    ("greedy_layers_raised", 0, 3, "layers in which an exchange gains next to nothing"),
    ("greedy_layers_lowered", 0, 0, "none, by construction"),
    ("layers_with_larger_error", 0, 0, "none, by construction"),
    ("*_outside_half_to_one", 0, 0, "none, by construction"),
    ("input_terms_share_*", 0.01, 0, "sums over activations: no choice in it"),
]


def tolerance(metric: str) -> dict[str, float]:
    for pattern, relative, absolute, _ in TOLERANCES:
        if fnmatch(metric, pattern):
            return {"rel": relative, "abs": absolute}
    raise AssertionError(f"{metric} fits no pattern of TOLERANCES: say there how closely it is to be compared")


def differences(metrics: dict[str, float], reference: dict[str, float]) -> list[str]:
    """What is missing, new or too far from the reference, one line each."""
    lines = [f"{name}: missing" for name in sorted(reference.keys() - metrics.keys())]
    lines += [f"{name}: not in the reference" for name in sorted(metrics.keys() - reference.keys())]
    for name in sorted(metrics.keys() & reference.keys()):
        if metrics[name] != pytest.approx(reference[name], **tolerance(name)):
            lines.append(f"{name}: {metrics[name]}, reference {reference[name]}, allowed {tolerance(name)}")
    return lines


def code_cells(notebook: Path) -> list:
    return [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The run folder. Model and texts are fetched first: a download in a notebook would print what was not printed."""
    sources.load_model()
    for corpus in sources.CORPORA:
        sources.load_texts(corpus, "held-out")
    folder = tmp_path_factory.mktemp("runs")
    yield folder
    for weights in folder.rglob("*.safetensors"):  # pytest keeps its folders for three runs
        weights.unlink()


@pytest.fixture(scope="module", params=NOTEBOOKS)
def checked(request, runs):
    notebook = ROOT / "notebooks" / f"{request.param}.ipynb"
    assert notebook.is_file(), f"{notebook.relative_to(ROOT)} is missing"
    return notebook, *run_nbval(notebook, runs, SECONDS_PER_CELL)


@pytest.mark.notebook
def test_notebook_runs_and_prints_what_it_printed(checked, record_property):
    notebook, done, passed = checked
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    cells = code_cells(notebook)
    assert len(passed) == len(cells) and all(passed.values())
    compared = [cell for cell in cells if "nbval-check-output" in cell.metadata.get("tags", [])]
    record_property("cells compared", len(compared))
    assert len(compared) >= FEWEST_COMPARED


@pytest.mark.notebook
def test_metrics_are_those_of_the_reference(checked, runs):
    notebook, _, _ = checked
    result = runs / "embedded" / "results" / f"{notebook.stem}.json"
    assert result.is_file(), f"{notebook.name} wrote no result"
    found, expected = json.loads(result.read_text(encoding="utf-8")), REFERENCE[notebook.stem]
    assert found["profile"] == "embedded"
    assert not (lines := differences(found["metrics"], expected)), "\n".join(lines)


@pytest.mark.notebook
def test_a_spoilt_output_is_noticed_where_it_is_compared(tmp_path):
    def cell(source, printed, *tags):
        output = nbformat.v4.new_output("stream", text=printed)
        return nbformat.v4.new_code_cell(source, outputs=[output], execution_count=1, metadata={"tags": list(tags)})

    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    notebook.cells = [
        cell("print('7 of 9 heads kept')", "7 of 9 heads kept\n", "nbval-check-output"),
        cell("print('7 of 9 heads kept')", "6 of 9 heads kept\n", "nbval-check-output"),
        cell("print('took 3.1 s')", "took 2.8 s\n"),
    ]
    nbformat.write(notebook, tmp_path / "spoilt.ipynb")
    done, passed = run_nbval(tmp_path / "spoilt.ipynb", tmp_path)
    assert done.returncode == 1
    assert list(passed.values()) == [True, False, True]
    assert "6 of 9 heads kept" in done.stdout


def test_differences_of_metrics_are_named():
    reference = {"ppl_50_slimllm_news": 100.0, "greedy_layers_lowered": 0.0, "mlp_mean_scale": 1.0}
    assert differences(reference, reference) == []
    assert differences(reference | {"ppl_50_slimllm_news": 104.9, "mlp_mean_scale": 1.009}, reference) == []
    found = {"ppl_50_slimllm_news": 105.1, "greedy_layers_lowered": 1.0, "ppl_20_slimllm_news": 70.0}
    lines = differences(found, reference)
    assert [line.split(":")[0] for line in lines] == [
        "mlp_mean_scale",
        "ppl_20_slimllm_news",
        "greedy_layers_lowered",
        "ppl_50_slimllm_news",
    ]
    with pytest.raises(AssertionError, match="seconds fits no pattern"):
        differences({"seconds": 1.0}, {"seconds": 1.0})


@pytest.mark.slow
def test_no_verdict_changes_within_the_tolerances():
    """Else a machine that rounds differently would pass here and fail where the verdicts are compared."""
    embedded = load_profile("embedded")
    for notebook, metrics in REFERENCE.items():
        expected = {one.id: one.verdict for one in judge(notebook, metrics, embedded)}
        allowed = {name: max(tolerance(name)["rel"] * abs(v), tolerance(name)["abs"]) for name, v in metrics.items()}
        claims = {claim.id: claim for claim in load_claims(notebook, embedded)}
        for signs in product((-1, 1), repeat=2):
            for claim in claims.values():
                moved = dict(metrics)
                for name, sign in zip((claim.left, claim.right), signs, strict=True):
                    if name in moved:
                        moved[name] += sign * allowed[name]
                found = {one.id: one.verdict for one in judge(notebook, moved, embedded)}
                assert found[claim.id] == expected[claim.id], (claim.id, signs)


def test_kept_results_are_those_of_all_notebooks():
    assert set(REFERENCE) == set(NOTEBOOKS)
