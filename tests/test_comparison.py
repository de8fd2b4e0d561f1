"""Methods side by side: equal budgets, statistics, and rows that are measured once."""

import functools
import json
import linecache
import shutil
from importlib import import_module

import numpy as np
import pytest
import torch

from conftest import make_small_model
from slimllm_nb import comparison, fingerprint, sources
from slimllm_nb.comparison import Comparison, Protocol, compare, judges
from slimllm_nb.comparison.__main__ import main, method_of
from slimllm_nb.comparison.compare import Bench
from slimllm_nb.comparison.protocol import protocol_of
from slimllm_nb.comparison.table import Row
from slimllm_nb.evaluation import perplexity, token_blocks
from slimllm_nb.fingerprint import digest
from slimllm_nb.generated import generate_samples, windows
from slimllm_nb.methods import as_method, register
from slimllm_nb.methods.ridge import ridge_fixed
from slimllm_nb.pruning import prune
from slimllm_nb.reproduce import load_profile

MODULE = import_module("slimllm_nb.comparison.compare")
PROFILE = """
name: tiny
description: a random model on its own texts
model: llama
seed: 0
texts: {mine: {files: [mine.txt]}, theirs: {files: [theirs.txt]}, others: {files: [others.txt]}}
calibration: {corpus: mine, num_samples: 12, length: 16}
evaluation: {corpora: [theirs, others], block_length: 16, max_tokens: 128}
settings:
  "20": {pruning_ratio: 0.3, pruned_layers: 3, alpha: 1, checkpoint: model}
  "50": {pruning_ratio: 0.5, pruned_layers: 3, alpha: 1, checkpoint: model-50}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = sources.load_tokenizer()
    make_small_model(4, vocab_size=len(tokenizer), intermediate_size=300, initializer_range=0.05).save_pretrained(
        folder / "llama"
    )
    tokenizer.save_pretrained(folder / "llama")
    for name, corpus, split in (
        ("mine", "news", "held-out"),
        ("theirs", "wikipedia", "held-out"),
        ("others", "news", "calibration"),
    ):
        texts = [text[:1000] for text in sources.load_texts(corpus, split)[:40]]
        (folder / f"{name}.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (folder / "tiny.yaml").write_text(PROFILE)
    return folder


@pytest.fixture
def profile(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMLLM_NB_RUNS", str(tmp_path))
    return load_profile(str(folder / "tiny.yaml"))


@pytest.fixture
def pruned(monkeypatch):
    """The names of the methods that prune() is called with."""
    names, real = [], MODULE.prune

    def counted(*arguments, method, **options):
        names.append(method.name)
        return real(*arguments, method=method, **options)

    monkeypatch.setattr(MODULE, "prune", counted)
    return names


def scores(output_weight):
    return output_weight.norm(dim=0)


MINE = {"channel_score": scores, "name": "mine"}


@torch.no_grad()
def test_methods_at_equal_budgets(profile, pruned):
    found = compare(["flap", MINE], seeds=2, profile=profile, progress=False)
    assert [(row.seed, row.setting, row.method) for row in found.rows] == [
        (seed, key, name) for seed in (0, 1) for key in ("20", "50") for name in ("slimllm", "flap", "mine")
    ]
    shares = found.frame.pivot_table(index=["seed", "setting"], columns="method", values="decoder_share")
    assert (shares.sub(shares.slimllm, axis=0).abs() <= 0.003).all(axis=None)
    assert (shares.xs("50", level="setting") < shares.xs("20", level="setting")).all(axis=None)
    assert found.rows[0].perplexity.keys() == found.dense.perplexity.keys() == {"theirs", "others"}
    assert found.frame.perplexity.nunique() == len(found.frame)  # another seed, method, setting, corpus: another number
    assert not found.frame.calibrated.any()
    assert "seconds" in found.table() and all(row.seconds > 0 for row in found.rows)
    # SlimLLM's row is what prune() gives by the setting's own ratio.
    assert pruned[:3] == ["slimllm", "flap", "mine"]


def test_a_row_is_measured_once(profile, pruned, tmp_path):
    first = compare(["flap"], ["20"], seeds=2, profile=profile, progress=False)
    assert pruned == ["slimllm", "flap"] * 2
    pruned.clear()
    again = compare(["flap"], ["20"], seeds=2, profile=profile, progress=False)
    assert not pruned and again.rows == first.rows and again.dense == first.dense
    more = compare(["flap", MINE], ["20"], seeds=2, profile=profile, progress=False)
    assert pruned == ["mine"] * 2 and [row for row in more.rows if row.method != "mine"] == first.rows
    renamed = compare([MINE | {"name": "renamed"}], ["20"], seeds=2, profile=profile, progress=False)
    assert pruned == ["mine"] * 2 and {row.method for row in renamed.rows} == {"slimllm", "renamed"}
    compare(["flap"], ["20"], seeds=1, profile=profile, num_samples=13, progress=False)
    assert pruned[2:] == ["slimllm", "flap"]
    with (tmp_path / "tiny" / "comparison" / "note.txt").open("w") as file:
        file.write("not a row")
    assert compare(["flap"], ["20"], seeds=2, profile=profile, progress=False).rows == first.rows


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(profile, monkeypatch, tmp_path):
    calls, real = [], MODULE.prune

    def cut_off(*arguments, **options):
        calls.append(options["method"].name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(MODULE, "prune", cut_off)
    with pytest.raises(KeyboardInterrupt):
        compare(["wanda_sp"], ["20"], seeds=2, profile=profile, progress=False)
    assert len(list((tmp_path / "tiny" / "comparison").glob("*"))) == 2
    compare(["wanda_sp"], ["20"], seeds=2, profile=profile, progress=False)
    assert calls == ["slimllm", "wanda_sp", "slimllm", "slimllm", "wanda_sp"]


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        (["flapp"], {}, "unknown method 'flapp'; allowed: flap"),
        (["flap", {"channel_score": "norm_product", "name": "flap"}], {}, "two methods are called 'flap'"),
        ([lambda input_norms: input_norms], {}, "<lambda> is not registered: say what it is"),
        (["flap"], {"settings": ["30"]}, "profile tiny has no setting 30; allowed: 20, 50"),
        (["flap"], {"seeds": 0}, "seeds is 0; allowed: at least 1"),
        (["flap"], {"calibrate_on": ["hamlet"]}, "hamlet is for judging alone"),
        (["flap"], {"judge_on": ["mine"]}, "mine would be calibrated and judged on"),
        (["flap"], {"judge_on": ["ours"]}, "unknown corpus 'ours'; allowed: news"),
        (["flap"], {"judge_on": ["mine:calibration"]}, "mine would be calibrated and judged on"),
        (["flap"], {"judge_on": ["wikipedia:foo"]}, "'wikipedia:foo' names no half of wikipedia; allowed"),
        (["flap"], {"num_samples": 0}, "num_samples"),
        (["flap"], {"generated": 13}, "generated is 13; allowed: 0 to 12"),
    ],
)
def test_what_cannot_be_compared_is_refused_at_once(methods, options, message, profile, monkeypatch):
    monkeypatch.setattr(MODULE, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        compare(methods, profile=profile, progress=False, **options)


def test_a_method_that_misses_the_budget_is_named(profile):
    def one_layer(pruning_ratio, num_layers):
        return torch.tensor([pruning_ratio] + [0.0] * (num_layers - 1))

    with pytest.raises(ValueError, match="method narrow, setting 50, seed 0: target_parameters is 0"):
        compare([{"allocation": one_layer, "name": "narrow"}], ["50"], seeds=1, profile=profile, progress=False)


def test_the_embedded_texts_are_compared_on_all_of_them():
    embedded = load_profile("embedded")
    found = protocol_of(embedded)
    assert found.calibrate_on == ("news", "wikipedia") and found.judge_on == ("news", "wikipedia", "hamlet")
    assert [found.calibrated(corpus) for corpus in found.judge_on] == [True, True, False]
    assert protocol_of(embedded, num_samples=128).num_samples == 128
    assert protocol_of(load_profile("llama-7b-20")).judge_on == ("wikitext2", "ptb")


@pytest.mark.slow
def test_the_models_own_text_to_calibrate_and_to_judge_on(profile):
    own, halves = {"generated": 5, "seeds": 1, "progress": False}, ["generated", "wikipedia:calibration"]
    found = compare([], ["20"], profile=profile, judge_on=halves, **own)
    assert (
        len(list(MODULE.comparison_folder("tiny").glob("*.safetensors"))) == 2
    )  # kept: samples, and what is judged on
    model, tokenizer = sources.load_model(profile.model), sources.load_tokenizer(profile.model)
    texts = sources.load_texts("mine", "calibration", profile.texts)
    samples = torch.cat([windows(texts, tokenizer, 7, 16, 0), generate_samples(model, tokenizer, 5, 16, 0)])
    by_hand, _ = prune(model, samples, **profile.settings["20"].arguments, progress=False)
    blocks = {"generated": generate_samples(model, tokenizer, 8, 16, judges.SEED)}
    blocks["wikipedia:calibration"] = token_blocks(sources.load_texts("wikipedia", "calibration"), tokenizer, 16, 128)
    expected = {name: perplexity(by_hand, one, progress=False) for name, one in blocks.items()}
    assert found.rows[0].perplexity == pytest.approx(expected, rel=1e-5)
    assert found.protocol.calibrated("mine") and not found.protocol.calibrated("wikipedia:calibration")


# Statistics, by hand.


def rows(method, values, corpus="news"):
    sizes = {"decoder_parameters": 80, "decoder_share": 0.8, "model_parameters": 90, "model_share": 0.9}
    return [Row(method=method, setting="20", seed=s, perplexity={corpus: v}, **sizes) for s, v in enumerate(values)]


def made(*lists) -> Comparison:
    protocol = Protocol(
        calibrate_on=("news",), judge_on=("news",), num_samples=8, length=16, block_length=16, max_tokens=None
    )
    dense = Row(method="dense", perplexity={"news": 5.0}, decoder_parameters=1, decoder_share=1, **MODEL)
    return Comparison(protocol, dense, [row for one in lists for row in one])


MODEL = {"model_parameters": 1, "model_share": 1}


def test_means_deviations_and_paired_differences():
    found = made(rows("slimllm", [10.0, 20.0, 40.0]), rows("half", [5.0, 11.0, 19.0]), rows("same", [11.0, 19.0, 41.0]))
    summary = found.summary()
    assert summary.loc[("20", "slimllm"), "news mean"] == pytest.approx(70 / 3)
    assert summary.loc[("20", "slimllm"), "news std"] == pytest.approx(np.std([10, 20, 40], ddof=1))
    differences = found.differences()
    half = differences.loc[("20", "half", "news")]
    logs = np.log([0.5, 0.55, 0.475])
    # 4.302653: Student's t at 97.5 % with two degrees of freedom, from a table
    low, high = (logs.mean() + sign * 4.302653 * logs.std(ddof=1) / np.sqrt(3) for sign in (-1, 1))
    expected = 100 * (np.exp([logs.mean(), low, high]) - 1)
    assert [half.change, half.low, half.high] == pytest.approx(expected.tolist(), rel=1e-5)
    assert half.verdict == "lower" and differences.loc[("20", "same", "news")].verdict == "inconclusive"
    text = str(found)
    assert "news *" in text and "* calibrated on other documents of the corpus it is measured on: news" in text
    assert "23.3 ± 15.3" in text and "Dense: news 5.0." in text


def test_one_seed_has_no_deviation_and_tells_nothing():
    found = made(rows("slimllm", [10.0]), rows("half", [5.0]))
    line = found.differences().loc[("20", "half", "news")]
    assert line.change == pytest.approx(-50) and np.isnan(line.low) and line.verdict == "inconclusive"
    assert "10.0 " in found.table().to_string() and "±" not in found.table().to_string()
    assert "one seed" in found.plot().get_suptitle()


def test_the_picture():
    found = made(rows("slimllm", [10.0, 20.0]), rows("half", [5.0, 11.0]), rows("twice", [20.0, 41.0]))
    picture = found.plot()
    (axes,) = picture.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["half", "twice"]
    points = axes.containers[0].lines[0].get_xdata()
    assert points == pytest.approx([np.sqrt(0.5 * 0.55), np.sqrt(2 * 2.05)])
    assert axes.get_xscale() == "log" and "2 seeds, 95 % interval" in picture.get_suptitle()


# What a row depends on.

POWER = 2


def powers(power):
    def score(input_norms):
        return input_norms**power

    return score


def with_global(input_norms):
    return input_norms**POWER


def of(**parts):
    return digest(parts=as_method(parts).identity)


def test_a_method_is_known_by_its_parts():
    assert of(channel_score=powers(2)) == of(channel_score=powers(2)) != of(channel_score=powers(3))
    ridge = [of(recovery={"name": "ridge_fixed", "penalty": penalty}) for penalty in (0.1, 0.1, 0.2)]
    assert ridge[0] == ridge[1] != ridge[2]
    for shape in ((3,), ()):
        shifts = [of(channel_score=powers(torch.full(shape, value))) for value in (1.0, 1.0, 2.0)]
        assert shifts[0] == shifts[1] != shifts[2]
    partials = [of(recovery=functools.partial(ridge_fixed, penalty=penalty)) for penalty in (0.1, 0.1, 0.2)]
    assert partials[0] == partials[1] != partials[2]
    assert of(base="flap") == of(base="flap") != of(base="wanda_sp")
    assert of(channel_score=lambda input_norms: input_norms) != of(channel_score=lambda input_norms: 2 * input_norms)


def notebook_cell(source: str) -> dict:
    """As IPython runs it: the source can be had."""
    name, space = f"<cell {len(linecache.cache)}>", {"__name__": "__main__"}
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), space)
    return space


def test_functions_of_a_notebook_are_known_by_what_they_do():
    source = "power = 2\ndef helper(x):\n    return x ** power\ndef score(input_norms):\n    return helper(input_norms)"
    known = of(channel_score=notebook_cell(source)["score"])
    assert of(channel_score=notebook_cell("# a comment\n\n" + source)["score"]) == known
    for changed in (source.replace("power = 2", "power = 3"), source.replace("x ** power", "x * power")):
        assert of(channel_score=notebook_cell(changed)["score"]) != known

    class Score:
        __name__ = "score"

        def __call__(self, input_norms):
            return input_norms

    assert of(channel_score=Score()) != of(channel_score=Score())  # what is in it is unknown: measured anew
    assert of(channel_score=Score().__call__) != of(channel_score=Score().__call__)
    space = {}
    exec("def score(input_norms):\n    return input_norms", space)  # its source cannot be had
    assert of(channel_score=space["score"]) != of(channel_score=space["score"])


def test_a_row_follows_the_code_the_texts_and_the_model(profile, folder, tmp_path, monkeypatch):
    def made_by():
        return Bench(profile, protocol_of(profile)).made_by(as_method("slimllm"), "20", 0, None)

    known = made_by()
    assert made_by() == known
    shutil.copytree(folder, tmp_path / "copy")
    text = profile.texts["mine"].model_copy(update={"files": [str(tmp_path / "copy" / "mine.txt")]})
    profile = profile.model_copy(
        update={"texts": profile.texts | {"mine": text}, "model": str(tmp_path / "copy/llama")}
    )
    moved = made_by()
    assert moved != known
    for file in ("mine.txt", "llama/config.json"):
        with (tmp_path / "copy" / file).open("a") as stream:
            stream.write("\n\n")
        assert made_by() not in (moved, known)
        moved = made_by()
    shutil.copytree(fingerprint.PACKAGE, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "package" / "heads.py").write_text("")
    monkeypatch.setattr(fingerprint, "PACKAGE", tmp_path / "package")
    fingerprint._code.cache_clear()
    assert made_by() != moved
    fingerprint._code.cache_clear()


def test_a_registered_function_is_a_method_of_its_own():
    @register.channel_score("norm_of_the_column")
    def norm_of_the_column(output_weight):
        return output_weight.norm(dim=0)

    method = as_method(norm_of_the_column)
    assert method.channel_score.name == "norm_of_the_column" and method.head_score.name == "pearson"
    assert method.name == "slimllm, channel_score=norm_of_the_column"


# The command.

PARTS = """
from slimllm_nb.methods import register


@register.channel_score("{name}")
def mine(input_means):
    return input_means.abs()
"""


def test_the_command(profile, folder, tmp_path, capsys):
    (tmp_path / "parts.py").write_text(PARTS.format(name="means_of_the_command"))
    options = ["--profile", str(folder / "tiny.yaml"), "--parts", str(tmp_path / "parts.py"), "--settings", "20"]
    methods = "flap,channel_score=means_of_the_command,flap+recovery=none"
    assert main([*options, "--methods", methods, "--seeds", "2", "--samples", "9"]) == 0
    out = capsys.readouterr().out
    for name in ("slimllm", *methods.split(",")):
        assert name in out
    assert "9 calibration samples of 16 tokens" in out and "mean [95 % interval]" in out
    lines = (tmp_path / "tiny" / "comparison" / "rows.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * 2 * 2 and lines[0].startswith("method,setting,seed,")
    assert (tmp_path / "tiny" / "comparison" / "picture.png").read_bytes().startswith(b"\x89PNG")
    for path in (tmp_path / "tiny" / "comparison").glob("*.json"):
        assert json.loads(path.read_text())["perplexity"].keys() == {"theirs", "others"}
    assert main([*options, "--methods", "flapp"]) == 2
    assert "Stopped: unknown method 'flapp'; allowed:" in capsys.readouterr().err


def test_how_the_command_names_methods():
    assert method_of("flap") == "flap"
    assert method_of("flap+recovery=ridge") == {"base": "flap", "name": "flap+recovery=ridge", "recovery": "ridge"}
    assert method_of("channel_score=norm_product")["base"] == "slimllm"
    assert comparison.compare is compare


RELU, WEIGHTS, TWICE = torch.nn.ReLU(), np.arange(3.0), functools.partial(torch.mul, 2.0)


def with_module(input_norms):
    return RELU(input_norms)


def with_array(input_norms):
    return input_norms * float(WEIGHTS.sum())


def with_partial(input_norms):
    return TWICE(input_norms)


@pytest.mark.parametrize("score", [with_module, with_array, with_partial])
def test_what_a_notebooks_score_names_is_known_again(score, monkeypatch):
    """A module, an array and a partial of the notebook's own: the same digest every time, another one when changed."""
    method = {"name": "mine", "channel_score": score}
    first = of(**method)
    assert first == of(**method)
    for name, other in (("RELU", torch.nn.ELU()), ("WEIGHTS", WEIGHTS + 1), ("TWICE", functools.partial(max, 1.0))):
        monkeypatch.setitem(score.__globals__, name, other)
    assert first != of(**method)


def test_a_method_without_rows_at_one_setting_is_left_out_there():
    strong = [row.model_copy(update={"setting": "50"}) for row in rows("slimllm", [20.0, 21.0])]
    found = made(rows("slimllm", [10.0, 11.0]), rows("a", [9.0, 10.0]), strong).differences()
    assert [key[:2] for key in found.index] == [("20", "a")]
