"""A model's files in a folder, for what reads weights by itself."""

from pathlib import Path

from slimllm_nb.sources import embedded
from slimllm_nb.sources.hub import hub_error, local_copy
from slimllm_nb.sources.models import EMBEDDED_MODEL

FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]  # config, weights, tokenizer


def checkpoint_folder(model: str = EMBEDDED_MODEL, revision: str | None = None) -> Path:
    """The folder of "embedded", of a folder, or of a hub id (at `revision`), whose weights are fetched where they are
    not there. Raises: SourceError for what the hub refuses."""
    if model == EMBEDDED_MODEL:
        return embedded.folder(embedded.WEIGHTS)
    path = local_copy("models", model)
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=FILES))
    except Exception as error:  # no network shows itself as one of many kinds
        raise hub_error("model", model, revision, error) from error
