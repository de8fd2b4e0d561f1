"""The package as pip installs it: outside the checkout, in an environment that has its core dependencies alone."""

import re
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from conftest import make_small_model
from slimllm_nb.files import ROOT
from test_checkpoint import tokenizer  # noqa: F401  a fixture

pytestmark = pytest.mark.slow
PROGRAM = """
import sys, torch
from slimllm_nb import calibration, evaluation, pruning, sources
from slimllm_nb.comparison import compare
from slimllm_nb.corpora import CorpusError, find_corpus
from slimllm_nb.disk import checkpoint_perplexity, prune_checkpoint
from slimllm_nb.export import save_checkpoint
from slimllm_nb.reproduce import load_profile

assert "site-packages" in sources.__file__, sources.__file__
model, tokenizer = sources.load_model("source"), sources.load_tokenizer("source")
texts = sources.load_texts("mine", "calibration", load_profile("mine.yaml").texts)
ids = calibration.draw_samples(texts, tokenizer, 8, 16)
amount = {"pruning_ratio": 0.4, "pruned_layers": 3, "alpha": 2.0, "progress": False}
pruned, report = pruning.prune(model, ids, **amount)
save_checkpoint(pruned, tokenizer, "saved", report=report)
assert prune_checkpoint("source", "target", ids, **amount).layers[1].kept_heads == report.layers[1].kept_heads
blocks = evaluation.token_blocks(texts, tokenizer, 16, 160)
own = evaluation.perplexity(pruned, blocks, progress=False)
assert abs(checkpoint_perplexity("target", {"mine": blocks}, progress=False)["mine"] / own - 1) < 1e-5
print(compare(["magnitude"], settings=["20"], seeds=2, profile="mine.yaml", progress=False))
for call, error in (
    (lambda: load_profile("embedded"), "named profiles lie in data/ of the repository"),
    (lambda: find_corpus("ptb"), "data/corpora.yaml is in the repository, not in an installed package"),
    (lambda: sources.load_texts("wikipedia", "calibration"), "pip install 'slimllm-nb[embedded]'"),
):
    try:
        call()
    except (ValueError, sources.SourceError) as found:
        assert error in str(found), found
    else:
        raise AssertionError(error)
print("all of it works")
"""
PROFILE = """
name: mine
description: a small LLaMA on a text of one's own
model: source
seed: 0
texts: {mine: {files: [mine.txt]}, theirs: {files: [theirs.txt]}}
calibration: {corpus: mine, num_samples: 8, length: 16}
evaluation: {corpora: [theirs], block_length: 16, max_tokens: 160}
settings: {"20": {pruning_ratio: 0.3, pruned_layers: 3, alpha: 1, checkpoint: model}}
"""


def core_distributions() -> set[str]:
    """The core dependencies and theirs, as far as they are installed here."""
    found, waiting = set(), [Requirement(one) for one in distribution("slimllm-nb").requires]
    while waiting:
        one = waiting.pop()
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        if name in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        try:
            waiting += [Requirement(other) for other in distribution(name).requires or ()]
        except PackageNotFoundError:
            continue
        found.add(name)
    return found


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """An environment with the built wheel, and links to what it depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "-q"]
    venv.create(folder / "bare", symlinks=True)
    site = next((folder / "bare").glob("lib/python*/site-packages"))
    source = folder / "checkout"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "slimllm_nb"):  # the build leaves files beside its source
        subprocess.run(["cp", "-r", ROOT / name, source / name], check=True)
    subprocess.run([*install, "--no-build-isolation", "--target", str(site), str(source)], check=True)
    for name in core_distributions():
        for file in distribution(name).files:
            top = Path(file.parts[0])
            if top.name != ".." and not (site / top).exists():
                (site / top).symlink_to(Path(distribution(name).locate_file(top)))
    return folder / "bare" / "bin" / "python"


def test_library_use_works_from_a_wheel_alone(python, tokenizer, tmp_path):  # noqa: F811
    make_small_model(2).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    words = [word for word in tokenizer.get_vocab() if word.isalpha()] or list(tokenizer.get_vocab())
    for name, step in (("mine", 7), ("theirs", 11)):
        text = "\n\n".join(" ".join(words[(i * step + j) % len(words)] for j in range(60)) for i in range(400))
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "mine.yaml").write_text(PROFILE)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "SLIMLLM_NB_RUNS": str(tmp_path / "runs")}
    done = subprocess.run([python, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "magnitude" in done.stdout and done.stdout.endswith("all of it works\n")
