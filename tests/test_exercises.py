"""The notebooks' exercises: their solutions pass, their stubs and typical mistakes do not, and are told why."""

import re

import nbformat
import pytest
import torch

from slimllm_nb.exercises import check
from test_ground import ROOT

WITH_EXERCISES = {
    "01_calibration": 2,
    "02_head_importance": 2,
    "03_channel_importance": 2,
    "04_regression_recovery": 2,
    "05_ratio_allocation": 2,
    "06_evaluation": 1,
    "07_ablations": 1,
    "08_your_own_method": 1,
}

MISTAKES = {
    "my_norms": ("return sum(batch.norm(dim=0) for batch in batches)", "Case 2 of 3: expected "),
    "my_heads": (
        "return x.reshape(-1, x.shape[2] // heads, heads).transpose(1, 2)",
        r"Case 1 of 3: expected -?[\d.]+ at \[\d, \d, \d\], found ",
    ),
    "my_variance_without": ("return covariance.sum((1, 2)) - covariance[:, head, head]", "Case 1 of 3: expected "),
    "my_best_place": (
        "return int(heads.exchange_similarities(covariance, kept, candidate).argmax())",
        r"Case \d of 4: expected -1, found \d",
    ),
    "my_varying_magnitude": ("return activations.std(dim=0) * len(activations) ** 0.5 * direction", "Case 1 of 3"),
    "my_direction": (
        "v, d = torch.linalg.eigh(scatter)\n    return (torch.sigmoid(v) * (down_weight.T @ d)).norm(dim=1)",
        "Case 1 of 3: expected ",
    ),
    "my_fit": (
        "scale = full_output.std(0) / kept_output.std(0)\n"
        "    return scale, full_output.mean(0) - scale * kept_output.mean(0)",
        "Case 1 of 3: value 1: expected ",
    ),
    "my_unexplained": (
        "x, y = kept_output, full_output\n"
        "    return 1 - (x * y).sum(0).square() / (x.square().sum(0) * y.square().sum(0))",
        "Case 1 of 4: expected ",
    ),
    "my_ratios": (
        "inner = torch.softmax(alpha * similarity, dim=0) * mean_ratio * len(similarity)\n"
        "    inner[[0, -1]] = 0\n    return inner",
        "Case 1 of 3: expected ",
    ),
    "my_perplexity": (
        "return (-log_probabilities.gather(1, block[:, None])).mean().exp()",
        "Case 1 of 2: expected ",
    ),
    "my_interval": (
        "half = student * ratios.std(ddof=1) / len(ratios) ** 0.5\n"
        "    return tuple(100 * (one - 1) for one in (ratios.mean(), ratios.mean() - half, ratios.mean() + half))",
        "Case 1 of 3: value 1: expected ",
    ),
    "my_largest_share": (
        "parts = output_weight.abs() * input_variances.sqrt()\n"
        "    return (parts / parts.sum(dim=1, keepdim=True)).amax(dim=0)",
        "Case 1 of 3: expected ",
    ),
    "my_counts": ("return round(ratio * heads), round(ratio * channels)", "Case 3 of 5: value 1: expected 7, found 8"),
}


def exercises(notebook: str) -> list[tuple[str, str, str, str]]:
    """Name, stub, check and solution of every exercise."""
    cells = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
    tagged = [[cell, cell.metadata.get("tags", [])] for cell in cells]
    stubs = [index for index, (_, tags) in enumerate(tagged) if "exercise" in tags]
    found = []
    for index in stubs:
        stub, asked, answer = (cell.source for cell in cells[index : index + 3])
        assert "exercise-check" in tagged[index + 1][1]
        (solution,) = re.findall(r"<details><summary>Solution</summary>\n\n```python\n(.*?)\n```\n", answer, re.DOTALL)
        assert answer.endswith("</details>")
        found.append((re.match(r"def (\w+)", stub)[1], stub, asked, solution))
    return found


@pytest.fixture(scope="module", params=WITH_EXERCISES)
def notebook(request):
    """Its exercises, and the names that its cells of imports and of the exercises' setting up define."""
    cells = nbformat.read(ROOT / "notebooks" / f"{request.param}.ipynb", as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    names: dict = {}
    for cell in code:
        if "parameters" in cell.metadata.get("tags", []) or "reproduce.load_profile(profile)" in cell.source:
            exec(cell.source, names)
    (setup,) = (cell.source for cell in code if "exercise-setup" in cell.metadata.get("tags", []))
    exec(setup, names)
    found = exercises(request.param)
    assert len(found) == WITH_EXERCISES[request.param]
    return found, names


def said(names: dict, function: str, asked: str, capsys) -> str:
    """What the check says of a function."""
    own = dict(names)
    exec(function, own)
    exec(asked, own)
    return capsys.readouterr().out.strip()


def test_solutions_pass_and_stubs_do_not(notebook, capsys):
    found, names = notebook
    for name, stub, asked, solution in found:
        assert said(names, stub, asked, capsys) == f"{name}: not written yet (it returns None)"
        assert re.fullmatch(rf"{name}: passed, \d cases", said(names, solution, asked, capsys))


def test_typical_mistakes_are_told(notebook, capsys):
    found, names = notebook
    for name, stub, asked, _ in found:
        body, message = MISTAKES[name]
        wrong = stub.split('"""')[0] + body
        out = said(names, wrong, asked, capsys)
        assert re.match(rf"{name}: not passed\. {message}", out), out


def test_what_the_check_says(capsys):
    def expect(library, says, relative=1e-6):
        check(lambda x: x, library, [(torch.tensor([[1.0, 2.0]]),)], relative)
        out = capsys.readouterr().out
        assert out.startswith("<lambda>: ") and says in out, out

    expect(lambda x: x, "passed, 1 cases")
    expect(lambda x: x.double() + 1e-7, "passed")
    expect(lambda x: x + 1e-3, "Case 1 of 1: expected 1.001 at [0, 0], found 1")
    expect(lambda x: x + torch.tensor([0, 1e-3]), "Case 1 of 1: expected 2.001 at [0, 1], found 2")
    expect(lambda x: x + 1e-3, "passed", relative=1e-2)
    expect(lambda x: x[0], "expected shape (2,), found (1, 2)")
    expect(lambda x: (x, x), "expected a tuple of 2, found a Tensor")
    expect(lambda x: x * torch.nan, "expected nan at [0, 0], found 1")
    check(lambda x: "a", lambda x: x, [(1,)])
    check(lambda x: (x,), lambda x: (x, x), [(1,)])
    check(lambda x: (x, x + 1), lambda x: (x, x), [(1,)])
    check(lambda x: torch.ones(0), lambda x: torch.ones(0), [(1,)])
    out = capsys.readouterr().out.splitlines()
    assert [line.split(": ", 1)[1] for line in out] == [
        "not passed. Case 1 of 1: expected numbers, found a str",
        "not passed. Case 1 of 1: expected a tuple of 2, found a tuple of 1",
        "not passed. Case 1 of 1: value 2: expected 1, found 2",
        "passed, 1 cases",
    ]
    with pytest.raises(ZeroDivisionError):
        check(lambda x: x / 0, lambda x: x, [(1,)])
