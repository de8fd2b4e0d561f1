"""What a run needs, said and refused before it starts."""

import shutil
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import make_small_model
from slimllm_nb.reproduce import cost, load_profile, profiles

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


@pytest.fixture
def machine(monkeypatch):
    """A machine of one's choice: GB of free disk, of memory, of the GPU (None: there is none), and DEVICE."""
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(LlamaConfig(**LLAMA_7B), dtype=torch.float16)

    def choose(disk=500.0, memory=64.0, gpu=None, device=""):
        monkeypatch.setenv(profiles.DEVICE, device)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=disk * 1e9))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=memory * 1e9))
        monkeypatch.setattr(cost, "_accelerator", lambda _: gpu)
        monkeypatch.setattr(cost, "_cached", lambda _: False)
        monkeypatch.setattr(cost, "_empty_model", lambda _: model)

    return choose


def test_hours_of_training_are_announced(machine, tmp_path):
    """As long as its tokens take where 5,700 of them a second were measured, with 80 % of the parameters."""
    machine(gpu=140.0)
    said = cost.announce(load_profile("llama-7b-20"), tmp_path)
    hours = 2 * 50_000 * 256 / 5_700 / 3600
    assert f"Training its models (tune: true) takes up to {hours:.1f} hours on an H200" in said
    assert "Training" not in cost.announce(load_profile("embedded"), tmp_path)


def test_a_7b_model_on_a_gpu(machine, tmp_path):
    machine(gpu=40.0)
    profile = load_profile("llama-7b-20")
    needed = cost.estimate(profile, on_device=True)
    # 13.5 GB of weights: dense, 80 % kept, 80 % in the making, and what is worked with.
    assert needed.device == pytest.approx(13.48 * 2.6 + 1.0, rel=0.01)
    assert needed.download == pytest.approx(13.48 + 3.02, rel=0.01)
    line = cost.announce(profile, tmp_path)
    assert "Profile llama-7b-20: downloads up to 16.5 GB, needs 17 GB of memory, 36 GB on the GPU" in line
    assert "(an estimate)" in line


def test_a_method_that_asks_for_gradients_needs_more(machine):
    """6.48 billion of them, one batch's in float16 and their sums in float32, beside the dense model."""
    machine()
    profile = load_profile("llama-7b-20")
    settings = {key: one.model_copy(update={"method": "llm_pruner"}) for key, one in profile.settings.items()}
    needed = cost.estimate(profile.model_copy(update={"settings": settings}), on_device=True)
    assert needed.device == pytest.approx(13.48 + 6.48 * 6 + 1.0, rel=0.01)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"disk": 10.0, "gpu": 80.0}, r"No space left on device: .* needs \d+\.\d GB in .*10.0 GB are free.*HF_HOME"),
    ],
)
def test_too_small_a_machine_is_refused(given, message, machine, tmp_path):
    machine(**given)
    with pytest.raises(cost.CostError, match=message):
        cost.announce(load_profile("llama-7b-20"), tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpu": 24.0}, "needs 37 GB of GPU memory, and 24 GB of it are free"),
        ({"memory": 16.0, "device": "cpu"}, "needs 38 GB of memory, and this machine has 16 GB"),
    ],
)
def test_a_model_for_one_layer_at_a_time_is_told(given, message, machine, tmp_path):
    machine(**given)
    with pytest.raises(cost.TooLargeError, match=message):
        cost.announce(load_profile("llama-7b-20"), tmp_path)


def test_billions_of_parameters_on_the_cpu_are_asked_for(machine, tmp_path, monkeypatch):
    machine()
    message = r"llama-7b-20 has 6.7 billion parameters and there is no GPU for it \(.*\); .*DEVICE=cpu"
    with pytest.raises(cost.CostError, match=message):
        cost.announce(load_profile("llama-7b-20"), tmp_path)
    machine(device="cpu")
    assert "needs 38 GB of memory" in cost.announce(load_profile("llama-7b-20"), tmp_path)
    machine(device="gpu")
    with pytest.raises(profiles.ProfileError, match="SLIMLLM_NB_DEVICE is 'gpu'; allowed: auto, cpu, cuda"):
        load_profile("llama-7b-20")


def test_the_default_run_fits_a_small_machine(machine, tmp_path):
    machine(disk=3.0, memory=8.0)
    assert "needs 4 GB of memory" in cost.announce(load_profile("embedded"), tmp_path)


def test_a_folder_is_counted_by_its_config(tmp_path):
    make_small_model(4).save_pretrained(tmp_path)
    profile = load_profile("llama-7b-20")
    model = cost._empty_model(profile.model_copy(update={"model": str(tmp_path)}))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in make_small_model(4).parameters())
    with pytest.raises(cost.CostError, match=r"no model .*nowhere"):
        cost._empty_model(profile.model_copy(update={"model": str(tmp_path / "nowhere")}))


def test_what_lies_on_one_disk_is_added_up(machine, tmp_path, monkeypatch):
    machine(disk=30.0, gpu=80.0)  # enough for the download or for the results, not for both
    monkeypatch.setattr(cost, "_cache", lambda _: tmp_path / "cache")
    with pytest.raises(cost.CostError, match=r"needs 44.\d GB in .*30.0 GB are free"):
        cost.announce(load_profile("llama-7b-20"), tmp_path / "runs")
