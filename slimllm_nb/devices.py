"""Where things are computed: which device, with how much memory, in which precision."""

import functools
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch
from torch import Tensor

Found = TypeVar("Found")


class DeviceError(ValueError):
    """A device that is not there, or that cannot be used."""


def find_device(device: str = "auto") -> torch.device:
    """ "auto": the machine's accelerator where there is one, else the CPU; a card that this PyTorch cannot use is said.

    Apple's (mps) has no float64, which the statistics need: "auto" leaves it alone, and it is refused.
    Raises: DeviceError for a device that is not there.
    """
    there, why_not = torch.accelerator.current_accelerator(check_available=True), None
    if there is None or (there.type == "cuda" and torch.cuda.get_device_capability() < _least_capability()):
        there, why_not = None, why_unusable()
    if device == "auto":
        if why_not:
            warnings.warn(f"{why_not}: computing on the CPU", stacklevel=2)
        return torch.device("cpu") if there is None or there.type == "mps" else there
    try:
        wanted = torch.device(device)
    except RuntimeError as error:  # no device at all: "gpu"
        raise DeviceError(f"device is {device!r}; allowed: auto, cpu, cuda, cuda:1 and their like") from error
    if wanted.type != "cpu" and (there is None or there.type != wanted.type):
        found = "cpu alone" if there is None else f"cpu and {there.type}"
        found += f" ({why_not})" if why_not else ""
        raise DeviceError(f"device is {device!r}, but PyTorch finds {found}; allowed: auto, or one of these")
    if wanted.type == "mps":
        raise DeviceError(f"device is {device!r}, which has no float64; allowed: auto (the CPU on this machine), cpu")
    return wanted


@functools.cache
def nvidia_card() -> tuple[str, str, str] | None:
    """Name, driver and compute capability of the first NVIDIA card that the driver shows; None where it shows none."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    shown = subprocess.run(asked, capture_output=True, text=True, check=False) if shutil.which(asked[0]) else None
    if shown is None or shown.returncode or not shown.stdout.strip():
        return None
    name, driver, capability = (one.strip() for one in shown.stdout.splitlines()[0].split(","))
    return name, driver, capability


def why_unusable() -> str | None:
    """Why this PyTorch cannot use the NVIDIA card that the driver shows; None where it shows none."""
    if (card := nvidia_card()) is None:
        return None
    name, driver, capability = card
    if torch.version.cuda is None:
        ours, remedy = "is built without CUDA", "install a build of PyTorch with CUDA"
    else:
        least = ".".join(map(str, _least_capability()))
        ours = f"is built for CUDA {torch.version.cuda} and compute capability {least} or higher"
        remedy = "update the driver, or install a build of PyTorch for this card"
    return (
        f"{name} (driver {driver}, compute capability {capability}) cannot be used by PyTorch {torch.__version__}, "
        f"which {ours}; {remedy}"
    )


def _least_capability() -> tuple[int, int]:
    """The lowest compute capability that this PyTorch has kernels for."""
    names = [one.partition("_")[2].rstrip("af") for one in torch.cuda.get_arch_list() if one.startswith("sm_")]
    return min((divmod(int(name), 10) for name in names), default=(0, 0))


@contextmanager
def exact_float32() -> Iterator[None]:
    """Inside it float32 products are not rounded to TF32 or bfloat16, whatever is set (NVIDIA's containers set TF32).

    Under TF32 other channels are kept: 129 of 36,863 of the embedded model."""
    places = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, one in zip(places, before, strict=True):
            place.fp32_precision = one


def halved(batch_size: int, what: str) -> int:
    """Half of a batch size for which memory ran out, and says so. To be called when nothing holds the batch any more.

    Raises: MemoryError where a single sample does not fit.
    """
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        torch.accelerator.empty_cache()
    if batch_size == 1:
        free = "" if device is None else f" ({torch.accelerator.get_memory_info()[0] / 1e9:.1f} GB are free)"
        says = "give shorter samples, a model in half precision, or prune from disk (prune_checkpoint)"
        raise MemoryError(f"{what}: out of memory with one sample at a time{free}; {says}")
    warnings.warn(f"{what}: out of memory; from here on {batch_size // 2} samples at a time", stacklevel=3)
    return batch_size // 2


def in_batches(run: Callable[[Tensor], Found], rows: Tensor, batch_size: int, what: str) -> Iterator[Found]:
    """run(batch) for all rows, `batch_size` at a time; where memory runs out, fewer at a time.

    Raises: MemoryError where a single one does not fit."""
    start = 0
    while start < len(rows):
        batch, ran = rows[start : start + batch_size], False
        with suppress(torch.OutOfMemoryError):  # what the failed run holds is free only behind it
            found, ran = run(batch), True
        if ran:
            start += len(batch)
            yield found
        else:
            batch_size = halved(min(batch_size, len(batch)), what)


def device_name(device: torch.device) -> str:
    """What a card is called; of others, their kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
