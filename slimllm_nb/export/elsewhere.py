"""A checkpoint as somebody else uses it: in a process of its own, where this package cannot be imported."""

import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
sys.modules["slimllm_nb"] = None  # importing it now fails
ids = torch.load("ids.pt", weights_only=True)
for number, folder in enumerate(sys.argv[2:]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval().to(sys.argv[1])
    with torch.no_grad():
        torch.save(model(ids.to(model.device)).logits.cpu(), f"{number}.pt")
"""


def logits_elsewhere(
    folders: Iterable[str | Path], input_ids: Int[Tensor, "samples length"], device: torch.device | str = "cpu"
) -> list[Float[Tensor, "samples length vocabulary"]]:
    """Logits of the checkpoint in each folder, on the CPU, computed on `device` by another Python process in which
    importing slimllm_nb fails. Raises: RuntimeError with what that process said where it ends in an error."""
    if torch.device(device).type != "cpu":
        torch.accelerator.empty_cache()  # the other process needs the room
    names = [str(Path(folder).resolve()) for folder in folders]
    with tempfile.TemporaryDirectory() as place:
        torch.save(input_ids, Path(place, "ids.pt"))
        command = [sys.executable, "-c", PROGRAM, str(device), *names]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{', '.join(names)}: loading them elsewhere failed:\n{done.stderr}")
        return [torch.load(Path(place, f"{index}.pt"), weights_only=True) for index in range(len(names))]
