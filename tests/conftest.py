"""Shapes are checked: every annotated function of the package runs under jaxtyping's checker in the tests."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: threads of several workers would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook

CHECKED = "covariance heads channels regression ratios calibration llama pruning evaluation.perplexity"
# Not modeling: transformers builds its configs from keyword arguments that a dataclass check does not know.
install_import_hook([f"slimllm_nb.{name}" for name in CHECKED.split()], "shape_checker.check")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from slimllm_nb.sources import embedded  # noqa: E402
from workplace import Workplace  # noqa: E402

# Files whose first test makes what the others take, or imports it for seconds.
TOGETHER = ("test_course.py", "test_prune_command.py", "test_stand_in.py", "test_zeroshot.py")


def pytest_configure(config):
    """The embedded model is converted once, before workers ask for it."""
    if not hasattr(config, "workerinput"):
        embedded.folder()


@pytest.hookimpl(optionalhook=True)  # some tests run pytest without xdist
def pytest_xdist_make_scheduler(config, log):
    """What is made once is made by one worker: these files, and the tests of one notebook; every other test is free."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            if file.endswith("test_notebooks.py") and "[" in test:
                return test.partition("[")[2]
            return file if file.endswith(TOGETHER) else nodeid

    return Together(config, log)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def unchecked(monkeypatch):
    """Call the package as a user does, without the shape checker, to see its own error messages."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(params=[8, 4, 2], ids=["multi-head", "groups-of-2", "groups-of-4"])
def small_model(request) -> LlamaForCausalLM:
    """A small random LLaMA with 8 query heads; head_dim is not hidden / heads, to catch code that assumes it."""
    return make_small_model(request.param)


def make_small_model(key_value_heads: int, **settings) -> LlamaForCausalLM:
    defaults = {
        "vocab_size": 101,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": key_value_heads,
        "head_dim": 4,
        "initializer_range": 0.15,  # large enough for attention that is not uniform
    }
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**(defaults | settings))).eval()


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Workplace:
    place = Workplace(tmp_path)
    place.patch(monkeypatch)
    return place
