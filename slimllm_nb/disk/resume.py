"""What a long walk over the layers leaves behind, so that it can go on where it was cut off."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from slimllm_nb.comparison import identity
from slimllm_nb.disk.stored import StoredModel
from slimllm_nb.files import replacing, write_text
from slimllm_nb.methods import Method


class Work:
    """A folder of finished steps. A step counts once its hidden states are there, which are written last.

    what: all that decides the result; a folder that was begun with something else is emptied.
    """

    def __init__(self, folder: Path, what: dict):
        self.folder = folder
        text = json.dumps(what, sort_keys=True, indent=1)
        if folder.is_dir() and self._text("what.json") != text:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "what.json", text)

    def _text(self, name: str) -> str | None:
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def begun(self, walk: str) -> tuple[int, Tensor] | None:
        """How many layers of this walk are done, and what left the last of them; None: none."""
        files = sorted(self.folder.glob(f"{walk}-hidden-*.safetensors"))
        if not files:
            return None
        return int(files[-1].stem.rpartition("-")[2]), load_file(files[-1])["hidden"]

    def finish(self, walk: str, index: int, hidden: Tensor, value, tensors: dict[str, Tensor] | None = None) -> None:
        """Keep the result of layer `index`: a value that JSON can hold, and tensors."""
        if tensors is not None:
            with replacing(self._tensors(walk, index)) as partial:
                save_file({name: one.contiguous().cpu() for name, one in tensors.items()}, partial)
        write_text(self.folder / f"{walk}-value-{index:05}.json", json.dumps(value))
        with replacing(self.folder / f"{walk}-hidden-{index + 1:05}.safetensors") as partial:
            save_file({"hidden": hidden.contiguous().cpu()}, partial)
        (self.folder / f"{walk}-hidden-{index:05}.safetensors").unlink(missing_ok=True)

    def value(self, walk: str, index: int):
        return json.loads((self.folder / f"{walk}-value-{index:05}.json").read_text(encoding="utf-8"))

    def tensors(self, walk: str, index: int) -> dict[str, Tensor]:
        """As they were kept, memory-mapped."""
        return load_file(self._tensors(walk, index))

    def _tensors(self, walk: str, index: int) -> Path:
        return self.folder / f"{walk}-tensors-{index:05}.safetensors"

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def made_from(stored: StoredModel, method: Method, **others) -> dict:
    """What decides the result: the code, the source's files, the method's parts, and all settings and tensors."""
    return {
        "code": identity.of_code(),
        "source": identity.of_files(stored.folder.glob("*")),
        "computed": [str(stored.dtype), stored.device.type],
        "method": identity.of_method(method),
        "others": {name: identity.of_tensor(one) if isinstance(one, Tensor) else one for name, one in others.items()},
    }


def require_room(folder: Path, size: int) -> None:
    """Errors: ValueError unless the disk has room for so many bytes, those counted that are in the folder already."""
    there = sum(path.stat().st_size for path in folder.glob("*"))
    while not folder.exists():
        folder = folder.parent
    if shutil.disk_usage(folder).free + there < size:
        raise ValueError(
            f"{folder} has {shutil.disk_usage(folder).free / 1e9:.1f} GB free; the finished layers and the checkpoint "
            f"made of them may take {(size - there) / 1e9:.1f} GB: give a target on another disk"
        )
