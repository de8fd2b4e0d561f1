"""What a run will download and need, said and checked before it starts.

Sizes follow from the number of parameters; the time is an estimate from the tokens that go through the model, at a rate
that is written here, and is called one.
"""

import errno
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from slimllm_nb.corpora import find_corpus
from slimllm_nb.files import existing
from slimllm_nb.reproduce.profiles import Profile

GB = 1e9
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "auto": 2}
CORPUS_TOKENS = 350_000  # of WikiText-2's test split, and about those of PTB's validation split
TASK_TOKENS = 1_000_000  # of one zero-shot task with all its questions and choices, on average
# A second: of one CPU core in float32, of a data-centre GPU in half precision.
FLOPS = {"cpu": 5e10, "accelerator": 6e13}
LARGE = 1e9  # parameters from which on a run on the CPU has to be asked for
EMBEDDED = {"download": 0.12, "memory": 4.0, "disk": 1.5, "minutes": 6}  # minutes: measured on two cores; sizes: bounds


class CostError(ValueError):
    """The machine has too little disk or memory for a run, or its model cannot be reached."""


class TooLargeError(CostError):
    """The notebooks' models do not fit into memory at once; one layer after the other may (by_layer.py)."""


@dataclass(frozen=True)
class Estimate:
    """In GB and hours; `device` is the memory of the accelerator, None where there is none."""

    download: float
    disk: float
    memory: float
    device: float | None
    hours: float
    parameters: int = 0

    def __str__(self) -> str:
        needs = f"{self.memory:.0f} GB of memory" + (f", {self.device:.0f} GB on the GPU" if self.device else "")
        time = f"{60 * self.hours:.0f} minutes" if self.hours < 2 else f"{self.hours:.0f} hours"
        return (
            f"downloads up to {self.download:.1f} GB, needs {needs} and {self.disk:.1f} GB of disk, "
            f"takes about {time} (an estimate)"
        )


def announce(profile: Profile, folder: Path) -> str:
    """The estimate in one line. Raises: CostError when disk or memory cannot do it."""
    on_device = profile.model != "embedded" and _accelerator(profile.device)
    needed = estimate(profile, bool(on_device))
    if profile.device == "auto" and not on_device and needed.parameters >= LARGE:
        from slimllm_nb.devices import why_unusable

        raise CostError(
            f"profile {profile.name} has {needed.parameters / 1e9:.1f} billion parameters and there is no GPU for it "
            f"({why_unusable() or 'PyTorch finds none'}); on the CPU it takes about {needed.hours:.0f} hours: give "
            "`make` DEVICE=cpu, or set SLIMLLM_NB_DEVICE=cpu, to go on"
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
    if on_device and needed.device > on_device:
        raise TooLargeError(
            f"profile {profile.name} needs {needed.device:.0f} GB of GPU memory, and {on_device:.0f} GB of it are free"
        )
    return f"Profile {profile.name}: {needed}."


def estimate(profile: Profile, on_device: bool) -> Estimate:
    """What a run needs. In memory at once: the dense model, a pruned one for every setting, and one more in the making;
    activations and statistics (prune keeps up to 2 GB of activations)."""
    if profile.model == "embedded":
        known = EMBEDDED
        return Estimate(known["download"], known["disk"], known["memory"], None, known["minutes"] / 60)
    parameters, download = _size(profile)
    weights = parameters * BYTES[profile.dtype] / GB
    left = [_share_left(key, setting) for key, setting in profile.settings.items()]
    models = weights * (1 + sum(left) + max(left))
    working = min(6.0, 1 + 6 * weights)
    corpora = {profile.calibration.corpus, *profile.evaluation.corpora}
    texts = sum(source.download_gb for name in corpora if (source := find_corpus(name, profile.texts)))
    if on_device:
        memory, device = 4 + weights, models + working
    else:
        memory, device = models + working, None
    disk = weights * sum(left) + 2 * texts + 0.2
    return Estimate(download + texts, disk, memory, device, _hours(profile, parameters, on_device), parameters)


def _hours(profile: Profile, parameters: int, on_device: bool) -> float:
    """From the tokens that notebooks 00 to 06 and the dense gate put through a model, at FLOPS."""
    tokens = CORPUS_TOKENS if profile.evaluation.max_tokens is None else profile.evaluation.max_tokens
    passes = 8 + 4 * len(profile.settings)  # dense, rows and previews, over all corpora or the first
    total = tokens * passes * len(profile.evaluation.corpora)
    if profile.zeroshot:
        share = 1.0 if profile.zeroshot.limit is None else min(1.0, profile.zeroshot.limit / 3000)
        total += TASK_TOKENS * share * len(profile.zeroshot.tasks) * (1 + len(profile.settings))
    total += 25 * profile.calibration.num_samples * profile.calibration.length * len(profile.settings)
    rate = FLOPS["accelerator"] if on_device else FLOPS["cpu"] * (psutil.cpu_count() or 1)
    return 2 * parameters * total / rate / 3600 + 0.03


def _share_left(key: str, setting) -> float:
    if setting.target_parameters is not None:
        return setting.target_parameters
    return max(0.1, 1 - float(key) / 100)


def _size(profile: Profile) -> tuple[int, float]:
    """Parameters of the dense model, and GB to download: from the profile, the folder, or the hub's own entry."""
    from slimllm_nb.sources.hub import hub_error, local_copy

    folder = Path(local_copy("models", profile.model))
    if profile.cost is not None:
        return profile.cost.parameters, 0.0 if folder.is_dir() or _cached(profile) else profile.cost.download_gb
    if folder.is_dir():
        return count_parameters(folder), 0.0
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(profile.model, revision=profile.revision, expand=["safetensors"])
        parameters = info.safetensors.total
    except AttributeError as error:
        raise CostError(f"{profile.model} has no safetensors: give its size as `cost` in the profile") from error
    except Exception as error:  # no network shows itself as one of many kinds
        raise CostError(str(hub_error("model", profile.model, profile.revision, error))) from error
    return parameters, 0.0 if _cached(profile) else 2 * parameters / GB


def count_parameters(folder: Path) -> int:
    """Parameters of the safetensors files in a folder, from their headers. CostError where there are none."""
    from slimllm_nb.sources.models import weight_shapes

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CostError(f"{folder} has no *.safetensors file")
    return sum(math.prod(shape) for shape in weight_shapes(files).values())


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
        from slimllm_nb.sources.downloads import cache_folder

        return cache_folder()
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME)
