"""A checkpoint that travels: weights, the code they need, tokenizer, generation config, report and model card.

What is written is an ordinary transformers folder. `AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)` reads it where this package is not installed: modeling.py stands beside the weights.
"""

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers import __version__ as transformers_version

from slimllm_nb.checks import require_fitting, require_plain, require_whole
from slimllm_nb.evaluation import count_parameters
from slimllm_nb.pruning.report import PruningReport
from slimllm_nb.sources.embedded import CONVERTED

CARD = "README.md"
REPORT = "pruning_report.json"
CONFIG = "config.json"
PUBLISHED = PruningReport.model_fields["method"].default  # what SlimLLM as published is called
SUFFIXES = ("", "k", "M", "G", "T")


class BaseModel(NamedTuple):
    """What a model was pruned from. `licence` is a hub identifier ("apache-2.0"), or "other"."""

    name: str
    licence: str


EMBEDDED_BASE = BaseModel("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    report: PruningReport | None = None,
    results: Iterable[Mapping] | None = None,
    base_model: str | None = None,
    licence: str | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Write everything that another tool needs to use the model; returns the folder.

    report: what prune() returned; goes into the model card and, whole, into pruning_report.json. results: rows of a
    table of measurements (mappings with the same keys, or a DataFrame). base_model: "embedded", a hub id, or a local
    folder, of which only the name is told; None: where the model says that it was loaded from. licence: the base
    model's, as the hub writes it; known for "embedded".
    max_shard_size: weights above it are split into several files. The model's dtype is kept.

    The folder appears whole or not at all; a checkpoint that was there before is replaced.
    Raises: ValueError for an architecture that is not LLaMA's, adapters that are not merged, quantized weights, weights
    that are not all in memory, and a tokenizer that does not fit; FileExistsError for a folder that holds something
    else than a checkpoint.
    """
    folder = Path(folder).absolute()
    require_plain(model)
    require_fitting(model, tokenizer)
    require_whole(model)
    require_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    card = model_card(model, report, results, _base(base_model or model.config.name_or_path, licence))
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True) as name:
        partial = Path(name) / "new"
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        model.generation_config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / CARD).write_text(card, encoding="utf-8")
        if report is not None:
            (partial / REPORT).write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
        for path in partial.iterdir():  # safetensors keeps its files to their owner; the card has the usual mode
            path.chmod((partial / CARD).stat().st_mode)
        _put_in_place(partial, folder, Path(name) / "old")
    return folder


def require_free(folder: Path) -> None:
    """Raises: FileExistsError for a folder that holds something else than a checkpoint."""
    if folder.exists() and not (folder.is_dir() and ((folder / CONFIG).exists() or not any(folder.iterdir()))):
        raise FileExistsError(f"{folder} exists and holds no checkpoint; give another folder, or remove it")


def model_card(
    model: PreTrainedModel, report: PruningReport | None, results: Iterable[Mapping] | None, base: BaseModel
) -> str:
    """The README.md of a checkpoint, in the form that model hubs read."""
    hub_id = [] if base.name.count("/") != 1 else [f"base_model: {base.name}"]
    known = base.name or "not known"
    head = ["---", *hub_id, f"license: {base.licence}", "library_name: transformers"]
    head += ["pipeline_tag: text-generation", "tags: [llama, pruning, structured-pruning, slimllm]", "---"]
    parameters = count_parameters(model)["model"]
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    lines = [
        *head,
        f"# {base.name.rpartition('/')[2] or 'A LLaMA'}" + (f", pruned with {_method(report)}" if report else ""),
        "",
        f"{parameters:,} parameters, {decimal(size)}B in {dtype}. Base model: {known}; licence of the base model, "
        f"which holds for this one too: {base.licence}.",
        "",
    ]
    if report is not None:
        lines += _pruning(model, report)
    if results is not None:
        lines += ["## Measured", "", markdown_table(results), ""]
    own_code = model.config.model_type == "slim_llama"
    remote = ", trust_remote_code=True" if own_code else ""
    lines += [
        "## How to load it",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # where this file lies, or the hub id',
        f"model = AutoModelForCausalLM.from_pretrained(folder{remote})",
        f"tokenizer = AutoTokenizer.from_pretrained(folder{remote})",
        "```",
        "",
        f"Written with transformers {transformers_version}."
        + (" The layers differ in width; `modeling.py`, beside this file, is all the code they need." * own_code),
        "",
    ]
    return "\n".join(lines)


def markdown_table(rows: Iterable[Mapping]) -> str:
    """Rows with the same keys as a Markdown table; floats with four significant digits.

    Raises: ValueError when there is no row, or one has other keys than the first.
    """
    rows = list(rows.to_dict("records") if hasattr(rows, "to_dict") else rows)
    if not rows:
        raise ValueError("results has no rows; leave it out or give at least one")
    columns = list(rows[0])
    for row in rows:
        if list(row) != columns:
            raise ValueError(f"results has rows with the columns {columns} and {list(row)}; they must be the same")
    body = [[f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in rows]
    cells = [list(map(str, columns)), ["---"] * len(columns), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def decimal(count: float) -> str:
    """A count with three digits and a decimal prefix: 134515008 -> '135 M'."""
    power = 0
    while count >= 999.5 and power < len(SUFFIXES) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {SUFFIXES[power]}"


def _pruning(model: PreTrainedModel, report: PruningReport) -> list[str]:
    rows = []
    for layer, module in zip(report.layers, model.model.layers, strict=True):
        attention = module.self_attn
        rows.append(
            {
                "layer": layer.index,
                "ratio": f"{layer.ratio:.3f}",
                "query heads": f"{len(layer.kept_heads)} of {layer.heads}",
                "key/value heads left": attention.k_proj.out_features // attention.head_dim,
                "channels": f"{len(layer.kept_channels)} of {layer.channels}",
            }
        )
    summary = "\n".join(f"- {line}" for line in str(report).splitlines())
    biased = any(module.self_attn.o_proj.bias is not None for module in model.model.layers)
    with_what = ["Whole attention heads and MLP channels, with the method that the next lines name."]
    if report.method == PUBLISHED:
        with_what = ["Whole attention heads and MLP channels, with SlimLLM (ICML 2025, arXiv 2505.22689)."]
        with_what += ["A pruned projection has a bias: the shift of the paper's linear regression."] * biased
    return [
        "## What was removed",
        "",
        *with_what,
        "",
        summary,
        "",
        markdown_table(rows),
        "",
        f"The numbers of the heads and channels that were kept stand in `{REPORT}`.",
        "",
    ]


def _method(report: PruningReport) -> str:
    return "SlimLLM" if report.method == PUBLISHED else f"the method {report.method}"


def _base(base_model: str, licence: str | None) -> BaseModel:
    if base_model == "embedded" or Path(base_model).name == CONVERTED:
        return BaseModel(EMBEDDED_BASE.name, licence or EMBEDDED_BASE.licence)
    # A folder's place on this machine is nobody else's business, even where the folder is gone by now.
    local = base_model and (Path(base_model).is_absolute() or Path(base_model).exists())
    name = Path(base_model).resolve().name if local else base_model
    return BaseModel(name, licence or "other")


def _put_in_place(partial: Path, folder: Path, aside: Path) -> None:
    if folder.exists():
        folder.rename(aside)
    try:
        partial.rename(folder)
    except OSError:
        if aside.exists():
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
