"""Documents of a corpus by its name: embedded, a data set of the hub, or files of your own."""

import json
import random
from collections.abc import Mapping
from pathlib import Path

from slimllm_nb.corpora import EMBEDDED_CORPORA, NEVER_CALIBRATED, CorpusError, TextSource, find_corpus
from slimllm_nb.sources.embedded_texts import embedded_texts
from slimllm_nb.sources.hub import load_rows
from slimllm_nb.sources.packages import SourceError

CORPORA = EMBEDDED_CORPORA
SPLITS = ("calibration", "held-out")
PASSAGE = 2000  # characters: enough for a window of 128 tokens


def load_texts(corpus: str, split: str, own: Mapping[str, TextSource] | None = None) -> list[str]:
    """The documents of a corpus, in its own order.

    corpus: an embedded one, one of data/corpora.yaml, or one of your `own` (a profile's `texts`). split: of the
    embedded ones, which half (embedded_texts; "hamlet" is held out whole); the others are one split as they are, and
    are refused by a profile that would both calibrate and evaluate on them. Raises: SourceError for unknown names and
    for what cannot be loaded.
    """
    if split not in SPLITS:
        raise SourceError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
    try:
        source = find_corpus(corpus, own)
    except CorpusError as error:
        raise SourceError(str(error)) from error
    if source is None:
        if corpus in NEVER_CALIBRATED and split == "calibration":
            raise SourceError(f"the corpus {corpus!r} is for judging alone: it has no calibration half")
        return embedded_texts(corpus, split)
    documents = _from_files(source) if source.files else _from_dataset(source)
    if not documents:
        least = f" of at least {source.min_characters} characters" if source.min_characters else ""
        raise SourceError(f"the corpus {corpus!r} has no document{least}: {source.files or source.dataset}")
    return documents


def _from_dataset(source: TextSource) -> list[str]:
    """One column of one split; empty rows stay (the paper's perplexity joins them with the others)."""
    import pyarrow.compute as compute

    files = {"data_files": {source.split: source.data_files}} if source.data_files else {}
    rows = load_rows(source.dataset, source.split, source.config, source.revision, **files)
    if source.column not in rows.column_names:
        raise SourceError(
            f"the data set {source.dataset!r} has no column {source.column!r}; it has: {', '.join(rows.column_names)}"
        )
    texts = rows.data.column(source.column)
    if source.min_characters:
        texts = texts.filter(compute.greater_equal(compute.utf8_length(texts), source.min_characters))
    return texts.take(_thinned(len(texts), source)).to_pylist()


def _from_files(source: TextSource) -> list[str]:
    documents = [document for name in source.files for document in _read(Path(name), source.column)]
    documents = [one for one in documents if len(one) >= max(source.min_characters, 1)]
    return [documents[index] for index in _thinned(len(documents), source)]


def _thinned(count: int, source: TextSource) -> list[int]:
    """All of them, or max_documents at random, in their own order."""
    if source.max_documents is None or count <= source.max_documents:
        return list(range(count))
    return sorted(random.Random(0).sample(range(count), source.max_documents))


def _read(path: Path, column: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".txt":
            return _passages(text)
        return [json.loads(line)[column] for line in text.splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read the text file {path}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path} must hold one JSON object with {column!r} a line: {error!r}") from error


def _passages(text: str) -> list[str]:
    """Whole paragraphs, put together until there are PASSAGE characters; what is left at the end is one more."""
    passages, paragraphs = [], []
    for paragraph in filter(str.strip, text.split("\n\n")):
        paragraphs.append(paragraph.strip("\n"))
        if sum(map(len, paragraphs)) >= PASSAGE:
            passages.append("\n\n".join(paragraphs))
            paragraphs = []
    return passages + (["\n\n".join(paragraphs)] if paragraphs else [])
