"""From disk, one decoder layer at a time: pruning and perplexity of a LLaMA that need not fit in memory.

prune_checkpoint() is prune() with another source of layers and another sink: a layer is read, pruned and written before
the next one is read. In memory are one layer, its statistics and the tokens' hidden states.
"""

import copy
import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from slimllm_nb import calibration
from slimllm_nb.checks import require_fitting, require_ids, require_llama
from slimllm_nb.devices import find_device, in_batches
from slimllm_nb.evaluation.perplexity import negative_log_likelihood, perplexity_from_nll
from slimllm_nb.export.checkpoint import require_free, save_checkpoint
from slimllm_nb.files import begun, expanded, replacing, require_room, write_text
from slimllm_nb.fingerprint import digest
from slimllm_nb.methods import MethodLike, as_method
from slimllm_nb.methods.gradients import gradient_names
from slimllm_nb.progress import bar as progress_bar
from slimllm_nb.pruning.budget import PruningTarget
from slimllm_nb.pruning.prune import Layers, prune_decoder
from slimllm_nb.pruning.report import PruningReport
from slimllm_nb.pruning.sublayers import Settings
from slimllm_nb.sources import SourceError, load_tokenizer
from slimllm_nb.sources.families import NO_OUTPUT_BIAS, output_biases
from slimllm_nb.sources.models import empty_model, require_same_weights, weight_files, weight_shapes

HIDDEN_BYTES = 1 << 30  # hidden states that wait in memory for perplexity; more blocks read the layers once more


class StoredModel:
    """A LLaMA in a folder with safetensors. `skeleton` is the model with its layers' weights on the meta device (shapes
    alone); embedding, last norm and head are memory-mapped in the files' dtype. `layer(index)` reads one layer.

    dtype: of the weights as they are computed with; "auto": the checkpoint's own. device: where layers are computed.
    Raises: SourceError naming the folder and the first weight that is missing or has another shape than the config
    says; before any weight is read.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"):
        self.folder, self.device = expanded(folder), torch.device(device)
        if not (self.folder / "config.json").is_file():
            raise SourceError(f"{self.folder} has no config.json; allowed: a folder with a LLaMA in safetensors")
        self.skeleton = empty_model(str(self.folder), dtype=dtype)
        self.dtype = self.skeleton.dtype
        require_llama(self.skeleton)
        self.skeleton.config.name_or_path = str(self.folder)
        if (self.folder / "generation_config.json").is_file():
            self.skeleton.generation_config = GenerationConfig.from_pretrained(self.folder)
        self._file_of = weight_files(self.folder)
        self._zeros: dict[str, Tensor] = {}  # what the family's files do not hold
        if json.loads((self.folder / "config.json").read_text(encoding="utf-8"))["model_type"] == NO_OUTPUT_BIAS:
            self._zeros = output_biases(self.skeleton.config, self.dtype, self.device)
        self._check()
        rotation = LlamaRotaryEmbedding(self.skeleton.config)
        self.skeleton.model.rotary_emb = rotation.to(self.device)  # its buffers are in no file
        outside = {name for name in self._file_of if not name.startswith("model.layers.")}
        outside &= self.skeleton.state_dict().keys()
        self.skeleton.load_state_dict(self._read(outside, "cpu", None), strict=False, assign=True)
        self.skeleton.tie_weights()

    def layer(self, index: int) -> nn.Module:
        """A decoder layer with its weights on the device; on the CPU in the checkpoint's own dtype they stay mapped."""
        module, prefix = copy.deepcopy(self.skeleton.model.layers[index]), f"model.layers.{index}."
        tensors = self._read({prefix + name for name in module.state_dict()}, str(self.device), self.dtype)
        module.load_state_dict({name.removeprefix(prefix): one for name, one in tensors.items()}, assign=True)
        return module.requires_grad_(False).eval()

    def embed(self, input_ids: Int[Tensor, "samples length"]) -> Float[Tensor, "samples length hidden"]:
        weight = self.skeleton.model.embed_tokens.weight
        return nn.functional.embedding(input_ids.to(weight.device), weight).to(self.device, self.dtype)

    def _check(self) -> None:
        expected = {name: tuple(one.shape) for name, one in self.skeleton.state_dict().items()}
        found = weight_shapes(sorted(set(self._file_of.values())))
        if self.skeleton.config.tie_word_embeddings:
            for shapes in (expected, found):
                shapes.pop("lm_head.weight", None)
        missing, extra = expected.keys() - found.keys() - self._zeros.keys(), found.keys() - expected.keys()
        other = [(name, found[name], expected[name]) for name in expected.keys() & found.keys()]
        require_same_weights(str(self.folder), missing, extra, [one for one in other if one[1] != one[2]])

    def _read(self, names: set[str], device: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """These weights; dtype: None for the file's own. On the CPU they are memory-mapped where it is that."""
        tensors = {name: self._zeros[name] for name in names & self._zeros.keys()}
        names = names - self._zeros.keys()
        for file in sorted({self._file_of[name] for name in names}):
            with safe_open(file, framework="pt", device=device) as opened:
                here = [name for name in sorted(names) if self._file_of[name] == file]
                tensors |= {name: opened.get_tensor(name).to(dtype) for name in here}
        return tensors


class StoredLayers(Layers):
    """Layers of a stored model, and a folder of what was made of them. A layer is done once its output is there, which
    is written last. key: all that decides the result; a folder that was begun with something else is emptied."""

    def __init__(self, stored: StoredModel, batch_size: int, folder: Path, key: str):
        super().__init__(stored.skeleton, batch_size)
        self.stored, self.folder = stored, begun(folder, key)
        self.layer, self.embed = stored.layer, stored.embed

    def begun(self, walk: str) -> tuple[int, Tensor | None]:
        files = sorted(self.folder.glob(f"{walk}-hidden-*.safetensors"))
        if not files:
            return 0, None
        return int(files[-1].stem.rpartition("-")[2]), load_file(files[-1])["hidden"].to(self.stored.device)

    def keep(self, walk: str, index: int, hidden: Tensor, value, tensors: dict[str, Tensor]) -> None:
        with replacing(self.folder / f"{walk}-tensors-{index:05}.safetensors") as partial_file:
            save_file({name: one.contiguous().cpu() for name, one in tensors.items()}, partial_file)
        write_text(self.folder / f"{walk}-value-{index:05}.json", json.dumps(value))
        with replacing(self.folder / f"{walk}-hidden-{index + 1:05}.safetensors") as partial_file:
            save_file({"hidden": hidden.contiguous().cpu()}, partial_file)
        (self.folder / f"{walk}-hidden-{index:05}.safetensors").unlink(missing_ok=True)

    def kept(self, walk: str, index: int) -> tuple:
        """Tensors as they were kept, memory-mapped."""
        value = json.loads((self.folder / f"{walk}-value-{index:05}.json").read_text(encoding="utf-8"))
        return value, load_file(self.folder / f"{walk}-tensors-{index:05}.safetensors")


@torch.no_grad()
def prune_checkpoint(
    source: str | Path,
    target: str | Path,
    input_ids: Int[Tensor, "samples length"],
    *,
    pruning_ratio: float | None = None,
    target_parameters: float | None = None,
    target_of: str = "model",
    pruned_layers: int,
    alpha: float,
    channel_multiple: int = 1,
    method: MethodLike = "slimllm",
    similarity: Float[Tensor, "layers"] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    progress: bool = True,
    max_shard_size: str = "2GB",
    **card: str | None,
) -> PruningReport:
    """Prune the LLaMA in the folder `source` and write a checkpoint into `target`; returns the report.

    Settings as in prune(), which keeps the same heads and channels. dtype: what is computed with and written ("auto":
    the checkpoint's own). device: "cpu", "cuda", or "auto". max_shard_size, base_model, licence: as in save_checkpoint.

    What is cut off goes on at the layer where it was, when it is called again with the same settings: finished layers
    stand in `.<target>.work` beside the target until the checkpoint is whole.
    Raises: as prune(); SourceError for a folder that holds no LLaMA in safetensors; FileExistsError for a target
    that holds something else than a checkpoint; ValueError for a method that needs gradients of the whole model, and
    for a disk without room. All before the first layer is computed.
    """
    source, target, method = expanded(source), expanded(target).absolute(), as_method(method)
    if source.resolve() == target.resolve():
        raise ValueError(f"source and target are both {target}; allowed: another folder for what is pruned")
    require_free(target)
    if gradient_names(method):
        raise ValueError(f"method {method.name} asks for gradients, which need the whole model in memory: use prune()")
    stored = StoredModel(source, dtype, find_device(device))
    require_ids(stored.skeleton, input_ids)
    amount = PruningTarget(pruning_ratio, target_parameters, target_of, pruned_layers, alpha, channel_multiple)
    amount.check(stored.skeleton)
    tokenizer = load_tokenizer(str(source))
    require_fitting(stored.skeleton, tokenizer)
    folder = target.with_name(f".{target.name}.work")
    require_room(folder, 2 * sum(one.numel() for one in stored.skeleton.parameters()) * stored.dtype.itemsize)
    settings = Settings(method, similarity, seed)
    computed = stored.folder, stored.dtype, stored.device.type, batch_size
    key = digest(computed=computed, ids=input_ids, amount=amount, parts=method.identity, others=(similarity, seed))
    layers = StoredLayers(stored, batch_size, folder, key)
    pruned, report = prune_decoder(layers, input_ids, amount, settings, progress)
    card["base_model"] = card.get("base_model") or str(source)
    save_checkpoint(pruned, tokenizer, target, report=report, max_shard_size=max_shard_size, **card)
    shutil.rmtree(folder)
    return report


@torch.no_grad()
def checkpoint_perplexity(
    folder: str | Path,
    blocks: Mapping[str, Int[Tensor, "blocks block_length"]],
    *,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, float]:
    """evaluation.perplexity of the model in `folder`, dense or pruned, on every corpus.

    In memory are one layer, or the output head, and at most 1 GiB of hidden states. dtype, device: as in
    prune_checkpoint. Raises: SourceError for a folder that holds no LLaMA in safetensors; ValueError for blocks that
    are longer than the model's limit, and for a perplexity that is not finite.
    """
    stored = StoredModel(folder, dtype, find_device(device))
    for corpus, ids in blocks.items():
        require_ids(stored.skeleton, ids, f"blocks of {corpus}")
    found, token_bytes = {}, stored.dtype.itemsize * stored.skeleton.config.hidden_size
    for corpus, ids in blocks.items():
        some = ids.split(max(batch_size, HIDDEN_BYTES // (token_bytes * ids.shape[1])))
        total = sum(_likelihood(stored, one, batch_size, corpus, progress) for one in some)
        found[corpus] = perplexity_from_nll(total, ids, f"{folder}: the mean negative log-likelihood on {corpus}")
    return found


def _likelihood(stored: StoredModel, ids: Tensor, batch_size: int, corpus: str, progress: bool) -> float:
    """negative_log_likelihood of these blocks, all through one layer before the next one is read."""
    hidden = stored.embed(ids).cpu()  # they wait there: an accelerator holds a batch alone
    context, rows = partial(calibration.layer_context, stored.skeleton), torch.arange(len(ids))
    outside = stored.skeleton.model.norm, stored.skeleton.lm_head
    norm, head = (one.to(stored.device, stored.dtype) for one in outside)

    def forward(layer: nn.Module, some: Tensor) -> None:
        batch = hidden[some].to(stored.device)
        hidden[some] = layer(batch, **context(batch)).cpu()

    def nll(some: Tensor) -> float:
        return negative_log_likelihood(head(norm(hidden[some].to(stored.device))), ids[some].to(stored.device))

    layers = range(len(stored.skeleton.model.layers))
    for index in progress_bar(layers, desc=f"{corpus}, layer", progress=progress):
        list(in_batches(partial(forward, stored.layer(index)), rows, batch_size, f"{corpus}, decoder layer {index}"))
    return sum(in_batches(nll, rows, batch_size, f"{corpus}, output head"))
