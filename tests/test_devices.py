"""Where things are computed: devices, float32 that is not rounded, batches that are halved."""

import re

import pytest
import torch

from conftest import make_small_model
from slimllm_nb import calibration, devices
from slimllm_nb.command import command
from slimllm_nb.devices import DeviceError, exact_float32, find_device, in_batches
from slimllm_nb.evaluation import perplexity
from slimllm_nb.gpu import parts
from slimllm_nb.llama import PROJECTIONS
from slimllm_nb.methods.gradients import loss_gradients
from slimllm_nb.pruning import prune
from slimllm_nb.sources import load_model, load_texts, load_tokenizer
from workplace import write_notebook

AMOUNT = {"pruning_ratio": 0.4, "pruned_layers": 2, "alpha": 1.0, "progress": False}


@pytest.fixture
def input_ids(generator):
    return torch.randint(3, 101, (16, 10), generator=generator)


@pytest.fixture
def accelerator(monkeypatch):
    """What torch says of the machine."""
    devices.nvidia_card.cache_clear()

    def choose(kind, capability=(9, 0), kernels=("sm_75", "sm_90", "sm_120a", "compute_120")):
        there = None if kind is None else torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: there)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(kernels))

    yield choose
    devices.nvidia_card.cache_clear()


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A driver that shows a card."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'Tesla V100-SXM2-32GB, 450.80.02, 7.0'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def test_the_device_is_found_or_refused(accelerator, monkeypatch):
    monkeypatch.setenv("PATH", "")
    accelerator(None)
    assert find_device().type == find_device("cpu").type == "cpu"
    with pytest.raises(DeviceError, match="device is 'cuda', but PyTorch finds cpu alone; allowed"):
        find_device("cuda")
    with pytest.raises(DeviceError, match="device is 'gpu'; allowed: auto, cpu"):
        find_device("gpu")
    accelerator("cuda")
    assert find_device().type == "cuda" and find_device("cuda:1").index == 1
    with pytest.raises(DeviceError, match="finds cpu and cuda"):
        find_device("mps")
    accelerator("mps")
    assert find_device().type == "cpu"
    with pytest.raises(DeviceError, match="device is 'mps', which has no float64; allowed: auto"):
        find_device("mps")


@pytest.mark.parametrize("too_old", ["driver", "card"])
@pytest.mark.usefixtures("driver")
def test_a_card_that_cannot_be_used_is_said(too_old, accelerator):
    accelerator(None if too_old == "driver" else "cuda", capability=(7, 0))
    card = "Tesla V100-SXM2-32GB (driver 450.80.02, compute capability 7.0) cannot be used by PyTorch"
    ours = f"is built for CUDA {torch.version.cuda} and compute capability 7.5 or higher"
    with pytest.warns(UserWarning, match=rf"{re.escape(card)} .*{re.escape(ours)}.*: computing on the CPU"):
        assert find_device().type == "cpu"
    with pytest.raises(DeviceError, match=re.escape(f"device is 'cuda', but PyTorch finds cpu alone ({card}")):
        find_device("cuda")


def test_pruning_computes_in_float32_whatever_is_set(input_ids):
    """NVIDIA's containers set TF32; on a CPU the same setting rounds to bfloat16 where the processor has it."""
    seen = []

    def score(output_weight):
        seen.append((torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
        if len(seen) == 2:
            raise ArithmeticError
        return output_weight.double().norm(dim=0)

    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ArithmeticError):
            prune(make_small_model(2), input_ids, **AMOUNT, method={"channel_score": score})
        assert seen == [("ieee", "ieee")] * 2
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


def test_float32_is_not_rounded_on_a_processor_that_would():
    torch.set_float32_matmul_precision("medium")
    try:
        with exact_float32():
            rows = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
            assert torch.allclose((rows @ rows).double(), rows.double() @ rows.double(), atol=1e-4)
    finally:
        torch.set_float32_matmul_precision("highest")


class Memory:
    """Fails for more than `most` rows."""

    def __init__(self, most):
        self.most, self.sizes = most, []

    def __call__(self, batch):
        self.sizes.append(len(batch))
        if len(batch) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch.sum().item()


def test_batches_are_halved_until_they_fit():
    memory = Memory(2)
    with pytest.warns(UserWarning) as said:
        found = list(in_batches(memory, torch.arange(11), 8, "here"))
    assert memory.sizes == [8, 4, 2, 2, 2, 2, 2, 1] and sum(found) == 55
    assert [str(one.message) for one in said] == [
        f"here: out of memory; from here on {size} samples at a time" for size in (4, 2)
    ]
    with pytest.warns(UserWarning), pytest.raises(MemoryError, match="here: out of memory with one sample at a time"):
        list(in_batches(Memory(0), torch.arange(2), 8, "here"))


def test_a_command_ends_in_one_line(capsys):
    @command
    def main(arguments):
        with pytest.warns(UserWarning):
            list(in_batches(Memory(0), torch.arange(2), 8, "decoder layer 3"))

    assert main() == 2
    assert capsys.readouterr().err.startswith("Stopped: decoder layer 3: out of memory with one sample at a time")


def test_perplexity_with_fewer_blocks_at_a_time(input_ids, monkeypatch):
    model = make_small_model(2)
    whole, forward = perplexity(model, input_ids, progress=False), model.forward

    def small(ids, **options):
        Memory(3)(ids)
        return forward(ids, **options)

    monkeypatch.setattr(model, "forward", small)
    with pytest.warns(UserWarning, match="perplexity: out of memory; from here on 2 samples at a time"):
        assert perplexity(model, input_ids, progress=False) == pytest.approx(whole, rel=1e-6)


@pytest.mark.slow
def test_gradients_in_float16_are_those_of_float32():
    """Less than 0.5 % of the channels with the lowest scores are others: here 0.2 %. Without LOSS_SCALE they are 0.95 %
    on these four samples, and on two 0.48 %, which would pass."""
    samples = calibration.draw_samples(load_texts("news", "calibration"), load_tokenizer(), 4, 32, seed=0)
    model, names = load_model(dtype=torch.float16), list(PROJECTIONS["mlp"].values())
    found = []
    for dtype in (torch.float16, torch.float32):
        model = model.to(dtype)
        gradients = loss_gradients(model, samples, [f"mlp.{one}.weight" for one in names], progress=False)
        found.append([set(lowest(*pair)) for pair in zip(model.model.layers, gradients, strict=True)])
    pairs = list(zip(*found, strict=True))
    assert sum(len(one - other) for one, other in pairs) <= 0.005 * sum(len(other) for _, other in pairs)


def lowest(layer, gradients):
    """The quarter of the channels with the lowest first-order scores."""
    total = 0.0
    for name in PROJECTIONS["mlp"].values():
        weight, gradient = getattr(layer.mlp, name).weight, gradients[f"mlp.{name}.weight"]
        total += (weight.double() * gradient).abs().sum(0 if name == "down_proj" else 1)
    return total.argsort()[: len(total) // 4].tolist()


def test_the_proof_of_a_gpu_runs_cells_where_papermill_is_missing(tmp_path, monkeypatch):
    cells = "import os\nfor_all = os.environ['SLIMLLM_NB_DEVICE']", "[display(one) for one in for_all]"
    write_notebook(tmp_path, "00", *cells)
    monkeypatch.setattr(parts, "find_spec", lambda name: None)
    asked = parts.Asked(torch.device("cpu"), True, tmp_path)
    assert parts.notebooks(asked)["00"]["by"] == "its cells"
    write_notebook(tmp_path, "01", "raise ArithmeticError('here')")
    with pytest.raises(RuntimeError, match=r"01.ipynb \(its cells\): ArithmeticError: here"):
        parts.notebooks(asked)
