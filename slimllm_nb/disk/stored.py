"""A checkpoint on disk of which only what is asked for is in memory."""

import copy
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from slimllm_nb.llama import require_llama
from slimllm_nb.sources.downloads import SourceError
from slimllm_nb.sources.models import require_llama_config


class StoredModel:
    """A LLaMA in a folder with safetensors. `skeleton` is the model without its decoder layers' weights (they are on
    the meta device: shapes alone). Embedding, last norm and head are memory-mapped, in the files' dtype until
    convert(); `layer(index)` reads one layer.

    dtype: of the weights as they are computed with; "auto": the checkpoint's own. device: where layers are computed.
    Errors: SourceError naming the folder and the first weight that is missing or has another shape than the config
    says; before any weight is read.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"):
        self.folder, self.device = Path(folder), torch.device(device)
        if not (self.folder / "config.json").is_file():
            raise SourceError(f"{self.folder} has no config.json; allowed: a folder with a LLaMA in safetensors")
        require_llama_config(str(self.folder), str(self.folder), {})
        config = AutoConfig.from_pretrained(self.folder)
        self.dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
        with torch.device("meta"):
            self.skeleton = AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval().requires_grad_(False)
        require_llama(self.skeleton)
        self.skeleton.config.name_or_path = str(self.folder)
        if (self.folder / "generation_config.json").is_file():
            self.skeleton.generation_config = GenerationConfig.from_pretrained(self.folder)
        self._file_of = self._files()
        self._check()
        # Buffers are in no file.
        self.skeleton.model.rotary_emb = LlamaRotaryEmbedding(config).to(self.device)
        outside = {name for name in self._file_of if not name.startswith("model.layers.")}
        outside &= self.skeleton.state_dict().keys()
        self.skeleton.load_state_dict(self._read(outside, "cpu", None), strict=False, assign=True)
        self.skeleton.tie_weights()

    @property
    def num_layers(self) -> int:
        return len(self.skeleton.model.layers)

    @property
    def size(self) -> int:
        """Bytes of all weights in the model's dtype."""
        tensors = self.skeleton.state_dict().values()
        return sum(tensor.numel() for tensor in tensors) * torch.empty(0, dtype=self.dtype).element_size()

    def layer(self, index: int) -> nn.Module:
        """A decoder layer with its weights on the device; on the CPU in the checkpoint's own dtype they stay mapped."""
        module, prefix = copy.deepcopy(self.skeleton.model.layers[index]), f"model.layers.{index}."
        names = {prefix + name for name in module.state_dict()}
        tensors = self._read(names, str(self.device), self.dtype)
        module.load_state_dict({name.removeprefix(prefix): one for name, one in tensors.items()}, assign=True)
        return module.requires_grad_(False).eval()

    def embed(self, input_ids: Tensor) -> Tensor:
        """(samples, length) -> (samples, length, hidden) on the device: what enters the first layer."""
        weight = self.skeleton.model.embed_tokens.weight
        return nn.functional.embedding(input_ids.to(weight.device), weight).to(self.device, self.dtype)

    def convert(self) -> None:
        """What is outside the layers in the model's dtype, which takes memory where that is not the files' own."""
        self.skeleton.to(self.dtype)

    def _files(self) -> dict[str, Path]:
        """The file of every weight."""
        if (self.folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
            names = json.loads((self.folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
        elif (self.folder / SAFE_WEIGHTS_NAME).is_file():
            names = dict.fromkeys(self._names(self.folder / SAFE_WEIGHTS_NAME), SAFE_WEIGHTS_NAME)
        else:
            raise SourceError(
                f"{self.folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}; "
                "allowed: weights in safetensors"
            )
        if missing := sorted({name for name in names.values() if not (self.folder / name).is_file()}):
            raise SourceError(f"{self.folder} lacks {len(missing)} of its files of weights, the first is {missing[0]}")
        return {name: self.folder / file for name, file in names.items()}

    def _names(self, file: Path) -> list[str]:
        with self._open(file) as opened:
            return list(opened.keys())

    def _open(self, file: Path, device: str = "cpu"):
        try:
            return safe_open(file, framework="pt", device=device)
        except (SafetensorError, OSError) as error:
            raise SourceError(f"cannot read {file}: {error}") from error

    def _check(self) -> None:
        expected = {name: tuple(one.shape) for name, one in self.skeleton.state_dict().items()}
        if self.skeleton.config.tie_word_embeddings:
            expected.pop("lm_head.weight", None)
        if missing := sorted(expected.keys() - self._file_of.keys()):
            raise SourceError(f"{self.folder} lacks {len(missing)} weights, the first is {missing[0]}")
        for file in sorted(set(self._file_of.values())):
            with self._open(file) as opened:
                for name in opened.keys() & expected.keys():
                    found = tuple(opened.get_slice(name).get_shape())
                    if found != expected[name]:
                        raise SourceError(
                            f"{file}: {name} has shape {found}; the config of {self.folder} says {expected[name]}"
                        )

    def _read(self, names: set[str], device: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """These weights; dtype: None for the file's own. On the CPU they are memory-mapped where it is that."""
        tensors = {}
        for file in sorted({self._file_of[name] for name in names}):
            with self._open(file, device) as opened:
                for name in sorted(names):
                    if self._file_of[name] == file:
                        tensors[name] = opened.get_tensor(name).to(dtype)
        return tensors
