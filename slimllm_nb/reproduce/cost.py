"""What a run will download and need, said and checked before it starts.

Sizes follow from the model's config, roughly: to tell a run that cannot fit from one that can.
"""

import errno
import itertools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from slimllm_nb.corpora import find_corpus
from slimllm_nb.files import cache_folder, existing
from slimllm_nb.reproduce.profiles import Profile

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

GB = 1e9
LARGE = 1e9  # parameters from which on a run on the CPU has to be asked for
BATCH = 8  # samples at a time, as prune() and perplexity() take them by default
ROOM = 1.0  # GB for activations and statistics: hidden states of 4,096 tokens, one layer's matrices
CONTEXT = 1.0  # GB of the GPU that its driver and its libraries take, and that lie between tensors
TRAINED = 5_700 * 5.4e9  # tokens times parameters that an H200 trained in a second (data/gpu)
INSTRUCTIONS = 50_000  # samples of cleaned Alpaca, about
EMBEDDED_RUN = {"download": 0.0, "disk": 1.5, "memory": 4.0}  # bounds


class CostError(ValueError):
    """The machine has too little disk or memory for a run, or its model cannot be reached."""


class TooLargeError(CostError):
    """The notebooks' models do not fit into memory at once; one layer after the other may (by_layer.py)."""


@dataclass(frozen=True)
class Estimate:
    """In GB; `device` is the memory of the accelerator, None where there is none."""

    download: float
    disk: float
    memory: float
    device: float | None = None
    parameters: int = 0

    def __str__(self) -> str:
        needs = f"{self.memory:.0f} GB of memory" + (f", {self.device:.0f} GB on the GPU" if self.device else "")
        fetched = f"downloads up to {self.download:.1f} GB, " if self.download else ""
        return f"{fetched}needs {needs} and {self.disk:.1f} GB of disk (an estimate)"


def announce(profile: Profile, folder: Path) -> str:
    """The estimate in one line. Raises: CostError when disk or memory cannot do it."""
    on_device = profile.model != "embedded" and _accelerator(profile.device)
    needed = estimate(profile, bool(on_device))
    if profile.device == "auto" and not on_device and needed.parameters >= LARGE:
        from slimllm_nb.devices import why_unusable

        raise CostError(
            f"profile {profile.name} has {needed.parameters / 1e9:.1f} billion parameters and there is no GPU for it "
            f"({why_unusable() or 'PyTorch finds none'}); on a CPU it takes hours to days: give `make` DEVICE=cpu, or "
            "set SLIMLLM_NB_DEVICE=cpu, to go on"
        )
    wanted = {folder: needed.disk, _cache(profile): needed.download}
    disks = {place: existing(place).stat().st_dev for place in wanted}
    for place in wanted:
        gigabytes = sum(size for other, size in wanted.items() if disks[other] == disks[place])
        free = shutil.disk_usage(existing(place)).free / GB
        if free < gigabytes:
            raise CostError(
                f"{os.strerror(errno.ENOSPC)}: profile {profile.name} needs {gigabytes:.1f} GB in {place}, and "
                f"{free:.1f} GB are free: free some, or set HF_HOME (downloads), SLIMLLM_NB_CACHE or SLIMLLM_NB_RUNS "
                "(results) to a folder on another disk"
            )
    memory = psutil.virtual_memory().total / GB
    if memory < needed.memory:
        raise TooLargeError(
            f"profile {profile.name} needs {needed.memory:.0f} GB of memory, and this machine has {memory:.0f} GB"
        )
    if on_device and needed.device + CONTEXT > on_device:
        raise TooLargeError(
            f"profile {profile.name} needs {needed.device + CONTEXT:.0f} GB of GPU memory, and {on_device:.0f} GB of "
            "it are free"
        )
    return f"Profile {profile.name}: {needed}.{_training(profile, needed.parameters)}"


def _training(profile: Profile, parameters: int) -> str:
    """How long notebook 09 trains, at most: samples are no longer than the recipe's."""
    if not profile.tune:
        return ""
    asked, left = profile.tuning.recipe, sum(_shares_left(profile))
    tokens = asked.epochs * (asked.samples or INSTRUCTIONS) * profile.tuning.length
    hours = tokens * parameters * left / TRAINED / 3600
    return f" Training its models (tune: true) takes up to {hours:.1f} hours on an H200, longer on a smaller card."


def estimate(profile: Profile, on_device: bool) -> Estimate:
    """What a run needs."""
    if profile.model == "embedded":
        return Estimate(**EMBEDDED_RUN)
    from slimllm_nb.sources.hub import local_copy

    model = _empty_model(profile)
    parameters = sum(one.numel() for one in model.parameters())
    weights, peak = parameters * model.dtype.itemsize / GB, peak_memory(profile, model) / GB
    corpora = {profile.calibration.corpus, *profile.evaluation.corpora}
    texts = sum(source.download_gb for name in corpora if (source := find_corpus(name, profile.texts)))
    there = Path(local_copy("models", profile.model)).is_dir() or _cached(profile)
    download = texts + (0.0 if there else 2 * parameters / GB)
    disk = weights * sum(_shares_left(profile)) * (1 + profile.tune) + 2 * texts + 0.2
    if on_device:
        return Estimate(download, disk, 4 + weights, peak, parameters)
    return Estimate(download, disk, 2 + peak, None, parameters)


def peak_memory(profile: Profile, model: "LlamaForCausalLM") -> float:
    """Bytes of notebook 06 at its peak: the dense model, a pruned one for every setting, another one in the making,
    and ROOM, or the logits of a batch, to work with. Or, of a method that asks for gradients, their sums in float32 and
    one batch's, beside the models that are there."""
    from slimllm_nb.methods import as_method
    from slimllm_nb.methods.gradients import gradient_names

    size, left = model.dtype.itemsize, _shares_left(profile)
    weights = sum(one.numel() for one in model.parameters()) * size
    tokens = BATCH * profile.evaluation.block_length
    room = max(ROOM * GB, tokens * model.config.vocab_size * (size + 8))  # logits as they are, in float32, logarithms
    peaks = [weights * (1 + sum(left) + max(left))]
    for setting, before in zip(profile.settings.values(), itertools.accumulate(left, initial=0.0), strict=False):
        names = gradient_names(as_method(setting.method or "slimllm"))
        numbers = sum(layer.get_parameter(name).numel() for layer in model.model.layers for name in names)
        peaks.append(weights * (1 + before) + (4 + size) * numbers)
    return max(peaks) + room


def _shares_left(profile: Profile) -> list[float]:
    """Of the model's parameters, by setting."""
    return [
        max(0.1, 1 - float(key) / 100) if setting.target_parameters is None else setting.target_parameters
        for key, setting in profile.settings.items()
    ]


def _empty_model(profile: Profile) -> "LlamaForCausalLM":
    from slimllm_nb.sources.models import empty_model

    try:
        return empty_model(profile.model, profile.revision, profile.dtype)
    except ValueError as error:
        raise CostError(str(error)) from error


def _cached(profile: Profile) -> bool:
    """Whether the model's files lie in the hub's cache already (its config does)."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(profile.model, "config.json", revision=profile.revision), str)


def _accelerator(device: str) -> float | None:
    """Free GB of the accelerator that the profile would run on; None for the CPU."""
    from slimllm_nb.devices import DeviceError, find_device

    try:
        found = find_device(device)
    except DeviceError as error:
        raise CostError(str(error)) from error
    if found.type == "cpu":
        return None
    import torch

    return torch.accelerator.get_memory_info(found)[0] / GB


def _cache(profile: Profile) -> Path:
    if profile.model == "embedded":
        return cache_folder()
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME)
