"""What a run needs, said and refused before it starts."""

import shutil
from types import SimpleNamespace

import psutil
import pytest

from conftest import make_small_model
from slimllm_nb.reproduce import cost, load_profile, profiles


@pytest.fixture
def machine(monkeypatch):
    """A machine of one's choice: GB of free disk, of memory, of the GPU (None: there is none), and DEVICE."""

    def choose(disk=500.0, memory=64.0, gpu=None, device=""):
        monkeypatch.setenv(profiles.DEVICE, device)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=disk * 1e9))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=memory * 1e9))
        monkeypatch.setattr(cost, "_accelerator", lambda _: gpu)
        monkeypatch.setattr(cost, "_cached", lambda _: False)

    return choose


def test_a_7b_model_on_a_gpu(machine, tmp_path):
    machine(gpu=80.0)
    profile = load_profile("llama-7b-20")
    needed = cost.estimate(profile, on_device=True)
    # 13.5 GB of weights: dense, 80 % kept, 80 % in the making, and what is worked with.
    assert needed.device == pytest.approx(13.48 * 2.6 + 6, rel=0.01)
    assert needed.download == pytest.approx(13.5 + 3.02)
    line = cost.announce(profile, tmp_path)
    assert "Profile llama-7b-20: downloads up to 16.5 GB, needs 17 GB of memory, 41 GB on the GPU" in line
    assert "(an estimate)" in line


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
        ({"gpu": 24.0}, "needs 41 GB of GPU memory, and 24 GB of it are free"),
        ({"memory": 16.0, "device": "cpu"}, "needs 41 GB of memory, and this machine has 16 GB"),
    ],
)
def test_a_model_for_one_layer_at_a_time_is_told(given, message, machine, tmp_path):
    machine(**given)
    with pytest.raises(cost.TooLargeError, match=message):
        cost.announce(load_profile("llama-7b-20"), tmp_path)


def test_billions_of_parameters_on_the_cpu_are_asked_for(machine, tmp_path, monkeypatch):
    machine()
    message = (
        r"llama-7b-20 has 6.7 billion parameters and there is no GPU for it \(.*\); .* about \d+ hours: .*DEVICE=cpu"
    )
    with pytest.raises(cost.CostError, match=message):
        cost.announce(load_profile("llama-7b-20"), tmp_path)
    machine(device="cpu")
    assert "needs 41 GB of memory" in cost.announce(load_profile("llama-7b-20"), tmp_path)
    machine(device="gpu")
    with pytest.raises(profiles.ProfileError, match="SLIMLLM_NB_DEVICE is 'gpu'; allowed: auto, cpu, cuda"):
        load_profile("llama-7b-20")


def test_the_default_run_fits_a_small_machine(machine, tmp_path):
    machine(disk=3.0, memory=8.0)
    assert "about 6 minutes" in cost.announce(load_profile("embedded"), tmp_path)


def test_a_folder_is_counted_by_its_headers(tmp_path):
    model = make_small_model(4)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert cost.count_parameters(tmp_path) == sum(p.numel() for p in model.parameters())
    with pytest.raises(cost.CostError, match=r"has no \*.safetensors file"):
        cost.count_parameters(tmp_path / "nowhere")


def test_what_lies_on_one_disk_is_added_up(machine, tmp_path, monkeypatch):
    machine(disk=20.0, gpu=80.0)  # enough for the download or for the results, not for both
    monkeypatch.setattr(cost, "_cache", lambda _: tmp_path / "cache")
    with pytest.raises(cost.CostError, match=r"needs 33.5 GB in .*20.0 GB are free"):
        cost.announce(load_profile("llama-7b-20"), tmp_path / "runs")
