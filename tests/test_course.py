"""The assignments: solutions get all points, stubs none, typical mistakes lose just what they should."""

import functools
import json
import shutil
import sys
import time

import nbformat
import pytest

import grading
from slimllm_nb import comparison
from slimllm_nb import sources as package_sources
from slimllm_nb.comparison import Comparison, protocol_of
from slimllm_nb.comparison.kept import kept_ablations
from slimllm_nb.reproduce.profiles import load_profile
from workplace import program

pytestmark = pytest.mark.slow
LOADED = {name: functools.cache(getattr(package_sources, name)) for name in ("load_model", "load_tokenizer")}


@pytest.fixture(scope="session")
def tool(tmp_path_factory):
    """tools/course.py, with otter where this process and its children find it."""
    course = program("tools/course.py")
    folder = tmp_path_factory.mktemp("otter")
    grading.install_otter(folder)
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(folder))
    patch.setenv("PYTHONPATH", str(folder))
    sys.path.append(sys.path.pop(0))  # what make test brings comes first
    yield course
    patch.undo()


@pytest.fixture(scope="session")
def released(tool, tmp_path_factory):
    folders = tool.release(list(tool.sources().values()), tmp_path_factory.mktemp("course"))
    return dict(zip(tool.sources(), folders, strict=True))


@pytest.fixture
def loaded_once(monkeypatch):
    """The embedded model is read once for all notebooks that are graded in this process, and what A5 compares comes
    from the kept sweep: the same protocol and budgets, another method's rows."""
    for name, loaded in LOADED.items():
        monkeypatch.setattr(package_sources, name, loaded)

    def compare(methods, settings, seeds, num_samples, judge_on, progress):
        rows = kept_ablations().groups["8 samples"].rows
        wanted = [row for row in rows if row.setting in settings and row.seed < seeds]
        named = [
            row.model_copy(update={"method": row.method.replace("obs_ridge", methods[0]["name"])}) for row in wanted
        ]
        protocol = protocol_of(load_profile("embedded"), judge_on=judge_on, num_samples=num_samples)
        return Comparison(protocol, named[0], named)

    monkeypatch.setattr(comparison, "compare", compare)


A1, A2, A3, A4, A5 = (
    "a1_perplexity_and_calibration",
    "a2_heads",
    "a3_channels",
    "a4_recovery",
    "a5_your_own_method",
)
ASSIGNMENTS = {
    A1: {"q1": 3, "q2": 4, "q3": 3, "q4": 6},
    A2: {"q1": 3, "q2": 5, "q3": 2, "q4": 7, "q5": 3, "q6": 2},
    A3: {"q1": 5, "q2": 6, "q3": 4, "q4": 3, "q5": 4},
    A4: {"q2": 5, "q3": 4, "q4": 7, "q5": 5},
    A5: {"q1": 5, "q2": 5, "q3": 4, "q4": 5, "q5": 2},
}
PADDED = "whole = -(-len(ids) // length); ids = list(ids) + [0] * (whole * length - len(ids))"
# Assignment, what is wrong, (text of the solution, what stands there instead), points that are lost by question.
MISTAKES = [
    (A1, "the rest is padded, not dropped", [("whole = len(ids) // length", PADDED)], {"q1": 2}),
    (
        A1,
        "off by one: every token predicts itself",
        [("logits[:, :-1]", "logits"), ("blocks[:, 1:, None]", "blocks[:, :, None]")],
        {"q2": 2, "q3": 2},
    ),
    (A1, "half precision", [("logits[:, :-1].float()", "logits[:, :-1]")], {"q2": 1}),
    (A1, "sample variance", [("self.squares / self.count -", "self.squares / (self.count - 1) -")], {"q4": 4}),
    (
        A1,
        "not centred",
        [(" - torch.outer(off, off)", ""), ("rows = rows - self.near", "pass"), ("self.near + self.sum", "self.sum")],
        {"q4": 6},
    ),
    (
        A1,
        "sums of squares in float32",
        [("rows = rows.double()", "rows = rows.float()"), ("= rows.mean(0)", "= torch.zeros_like(rows[0])")],
        {"q4": 2},
    ),
    (
        A2,
        "every head reads values of its own",
        [(".repeat_interleave(heads // len(values), dim=0)", ".repeat(heads // len(values), 1, 1)")],
        {"q1": 1},
    ),
    (A2, "no centring", [("part - part.mean(0), full - full.mean(0)", "part, full")], {"q2": 3}),
    (A2, "correlation over outputs, not tokens", [("part.norm(dim=0)", "part.norm(dim=1)")], {"q2": 5}),
    (A2, "no absolute value", [(".sum(0).abs() / lengths", ".sum(0) / lengths")], {"q2": 1}),
    (A2, "sample covariance", [("/ len(x)", "/ (len(x) - 1)")], {"q4": 4}),
    (A2, "more important is lower", [("[-similarity_of(", "[similarity_of(")], {"q3": 2}),
    (
        A2,
        "prunes the most important heads",
        [
            (
                "torch.argsort(torch.as_tensor(scores), stable=True)",
                "torch.argsort(torch.as_tensor(scores), descending=True)",
            )
        ],
        {"q5": 3},
    ),
    (A2, "exchanges even where it does not help", [("if max(values) > best:", "if True:")], {"q5": 3}),
    (A3, "outputs not centred", [("outputs.double() - outputs.double().mean(0)", "outputs.double()")], {"q1": 4}),
    (A3, "directions by rows", [("directions.double().T @", "directions.double() @")], {"q2": 3}),
    (A3, "not relative to the mean variance", [("variances / variances.mean()", "variances")], {"q2": 5}),
    (A3, "wrong axis", [("inputs.double().norm(dim=0)", "inputs.double().norm(dim=1).mean()")], {"q3": 4}),
    (A3, "keeps the most and the least of all", [("order[lowest + num_pruned :]", "order[num_pruned:]")], {"q4": 2}),
    (A3, "prunes every layer", [("ratios[layer] = ratio", "ratios[:] = ratio")], {"q5": 4}),
    (A4, "the shift forgets the scale", [("mean_y - scale * mean_x", "mean_y - mean_x")], {"q2": 4}),
    (A4, "through the origin", [("(x - mean_x)", "x"), ("(y - mean_y)", "y")], {"q2": 5}),
    (A4, "columns are scaled, not rows", [("scale[:, None] * weight", "scale * weight")], {"q3": 4}),
    (A4, "the scale is applied to the old bias", [("shift + bias", "shift + scale * bias")], {"q3": 3}),
    (A4, "shrinks towards zero", [("new = weight[:, kept] + ", "new = ")], {"q4": 7, "q5": 2}),
    (A4, "chosen by the fitted tokens", [('errors[penalty]["held out"])', 'errors[penalty]["fitted"])')], {"q5": 2}),
    (A5, "the deviation of the population", [("/ (len(logs) - 1)", "/ len(logs)")], {"q4": 4}),
    (A5, "the deviation of one, not of the mean", [("variance / len(logs))", "variance)")], {"q4": 4}),
    (A5, "differences, not ratios", [("math.log(one / other)", "one - other")], {"q4": 5}),
    (A5, "three seeds are called enough", [('"inconclusive"\n', '"lower"\n')], {"q5": 1}),
    (
        A5,
        "the published score under another name",
        [
            (
                "input_variances.sqrt() * output_weight.to(input_variances).abs().sum(dim=0)",
                "torch.arange(len(input_variances)).double()",
            )
        ],
        {"q2": 4},
    ),
]


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_the_solution_gets_all_points_and_the_stub_none(name, released, loaded_once):
    folder = released[name]
    assert grading.points(grading.cells(folder / "solution" / f"{name}.ipynb"), folder) == ASSIGNMENTS[name]
    stub = grading.points(grading.cells(folder / "student" / f"{name}.ipynb"), folder)
    assert stub == dict.fromkeys(ASSIGNMENTS[name], 0)


@pytest.mark.parametrize("name, mistake, changes, lost", MISTAKES, ids=[f"{one[0][:2]}: {one[1]}" for one in MISTAKES])
def test_a_mistake_loses_what_it_should(name, mistake, changes, lost, released, loaded_once):
    folder = released[name]
    cells = grading.cells(folder / "solution" / f"{name}.ipynb")
    for old, new in changes:
        assert any(old in cell for cell in cells), old
        cells = [cell.replace(old, new) for cell in cells]
    expected = {question: points - lost.get(question, 0) for question, points in ASSIGNMENTS[name].items()}
    assert grading.points(cells, folder) == expected


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_the_release_holds_no_solution_and_no_hidden_test(name, released, tool):
    source = tool.sources()[name].read_text(encoding="utf-8")
    student = (released[name] / "student" / f"{name}.ipynb").read_text(encoding="utf-8")
    notebook = nbformat.reads(student, as_version=4)
    code = "\n".join(cell.source for cell in notebook.cells) + json.dumps(notebook.metadata)
    assert "SOLUTION" not in student and "hidden=True" not in student
    assert all(cell.source and cell.source == cell.source.strip() for cell in notebook.cells)
    inside, found = False, 0
    for line in source.splitlines():
        if line.strip().startswith("# BEGIN SOLUTION"):
            inside = True
        elif line.strip() == "# END SOLUTION":
            inside = False
        elif inside and len(line.strip()) > 12:
            found += 1
            assert line.strip() not in code, line
        elif line.endswith("# SOLUTION"):
            found += 1
            assert line.removesuffix("# SOLUTION").strip() not in code, line
    assert found >= 5
    stated = int(source.split("| Points | ")[1].split()[0])
    manual = sum(int(part.split("# points: ")[1].split()[0]) for part in source.split("# manual: true")[1:])
    assert stated == sum(ASSIGNMENTS[name].values()) + manual


def test_a_folder_of_submissions_becomes_a_table(released, tool, tmp_path):
    """As they come: a zip file with another kernel, a student's folder, an empty, a broken, a foreign, one that leaves
    its folder, and an endless one: a line for each, and nothing hangs."""
    name = A1
    folder = released[name]
    for place in ("in", "endless"):
        (tmp_path / place).mkdir()

    def write(file: str, *changes: tuple[str, str], of: str = "solution", into: str = "in") -> None:
        text = (folder / of / f"{name}.ipynb").read_text(encoding="utf-8")
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / into / f"{file}.ipynb").write_text(text, encoding="utf-8")

    write("empty", of="student")
    write("endless", ("def cut_into_blocks", 'while True: pass\\n",\n    "def cut_into_blocks'), into="endless")
    (tmp_path / "in" / "alice").mkdir()
    (tmp_path / "zipped" / ".ipynb_checkpoints").mkdir(parents=True)
    write("my answers", ('"name": "python3"', '"name": "slim-env"'), into="zipped")
    shutil.copy(tmp_path / "zipped" / "my answers.ipynb", tmp_path / "zipped" / ".ipynb_checkpoints")
    shutil.make_archive(str(tmp_path / "in" / "bob smith"), "zip", tmp_path / "zipped")
    write("partial", ("self.squares / self.count -", "self.squares / (self.count - 1) -"), into="in/alice")
    (tmp_path / "in" / "carol.zip").write_bytes(b"not a zip file")
    write("elsewhere", ("def cut_into_blocks", "import os; os.chdir('..')\\n\",\n    \"def cut_into_blocks"))
    (tmp_path / "in" / "broken.ipynb").write_text("{ not a notebook", encoding="utf-8")
    (tmp_path / "in" / "other.ipynb").write_text(nbformat.writes(nbformat.v4.new_notebook()), encoding="utf-8")
    table = tool.grade_folder(tmp_path / "in", folder.parent, timeout=400).set_index("submission")
    assert table.points.to_dict() == {
        "broken.ipynb": 0,
        "carol": 0,
        "elsewhere.ipynb": 0,
        "empty.ipynb": 0,
        "bob smith": 16,
        "other.ipynb": 0,
        "alice": 12,
    }, table.reason.to_dict()
    reasons = table.reason
    assert reasons["bob smith"] == "all tests passed"
    assert reasons["elsewhere.ipynb"].startswith("no test ran: ")
    assert reasons["alice"].startswith("q4: AssertionError: covariance of (1, 2) and (3, 6): expected [[1.0, 2.0]")
    assert "and 2 more" in reasons["alice"]
    assert reasons["carol"] == "holds no notebook (*.ipynb), or cannot be unpacked"
    assert reasons["broken.ipynb"].startswith("not a notebook")
    assert reasons["other.ipynb"] == "not a notebook of this course: it names no assignment"
    start = time.perf_counter()
    endless = tool.grade_folder(tmp_path / "endless", folder.parent, timeout=5).iloc[0]
    assert (endless.points, endless.reason) == (0, "took more than 5 seconds and was stopped")
    assert time.perf_counter() - start < 40
    assert reasons["empty.ipynb"].startswith("q1: AssertionError: cut_into_blocks returned None: write its body")
    assert (tmp_path / "in" / "grades.csv").read_text().splitlines()[
        0
    ] == "submission,assignment,points,of,q1,q2,q3,q4,seconds,reason"
    with pytest.raises(tool.CourseError, match="holds no notebooks"):
        tool.grade_folder(folder / "autograder", folder.parent, timeout=1)
    with pytest.raises(tool.CourseError, match="--jobs is 0; allowed: at least 1"):
        tool.grade_folder(tmp_path, folder.parent, timeout=1, jobs=0)
