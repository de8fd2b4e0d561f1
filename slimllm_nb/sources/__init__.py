"""Models and texts: the embedded ones that need no hub and no account, a local folder, or a hub id."""

from slimllm_nb.files import cache_folder
from slimllm_nb.sources.families import as_llama
from slimllm_nb.sources.models import load_model, load_tokenizer
from slimllm_nb.sources.packages import SourceError
from slimllm_nb.sources.texts import CORPORA, SPLITS, load_texts

__all__ = ["CORPORA", "SPLITS", "SourceError", "as_llama", "cache_folder", "load_model", "load_texts", "load_tokenizer"]
