"""Corpora by name: the embedded ones, those of the hub in data/corpora.yaml, and files of your own."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from pydantic import Field, RootModel, model_validator

from slimllm_nb.files import ROOT
from slimllm_nb.settings import Settings, read_validated

EMBEDDED_CORPORA = ("news", "wikipedia", "hamlet", "debates")
NEVER_CALIBRATED = ("hamlet", "debates")  # show what a method loses on texts unlike those it was calibrated on
SET_ASIDE = ("debates",)  # judged on where they are named, so that no choice of a method has been guided by them
CORPORA = ROOT / "data" / "corpora.yaml"


class CorpusError(ValueError):
    """An unknown corpus, or a data/corpora.yaml that is not valid."""


class TextSource(Settings):
    """Where the documents of a corpus come from: a data set of the hub (`dataset`), or `files` of your own.

    dataset: a hub id, or a folder laid out like one; config, revision, data_files, split: as `datasets.load_dataset`
    has them (data_files: the pattern of the files that hold the split); column: the one with the text.
    files: .txt (cut between paragraphs into passages of about 2,000 characters) or .jsonl (one document a line, in
    `column`); in a profile's file, relative to that file.
    min_characters: documents with fewer are left out before anything is tokenized; max_documents: more than that are
    thinned out at random, always the same ones.
    """

    dataset: str | None = None
    config: str | None = None
    revision: str | None = None
    data_files: str | None = None
    split: str = "train"
    column: str = "text"
    files: list[str] | None = Field(default=None, min_length=1)
    min_characters: int = Field(default=0, ge=0)
    max_documents: int | None = Field(default=None, ge=1)
    download_gb: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _one_place(self):
        if (self.dataset is None) == (self.files is None):
            raise ValueError("give either dataset (a hub id or a folder) or files (a list of .txt or .jsonl files)")
        for name in self.files or ():
            if Path(name).suffix not in (".txt", ".jsonl"):
                raise ValueError(f"files may be .txt or .jsonl, not {name!r}")
        return self


class _Named(RootModel):
    root: dict[str, TextSource]


@cache
def named_corpora() -> dict[str, TextSource]:
    """The corpora of data/corpora.yaml, by name."""
    return read_validated(CORPORA, _Named, CorpusError).root


def find_corpus(name: str, own: Mapping[str, TextSource] | None = None) -> TextSource | None:
    """Where a corpus comes from: first among one's `own`, then in data/corpora.yaml; None for an embedded one.

    Raises: CorpusError for an unknown name; it lists the known ones.
    """
    if own and name in own:
        return own[name]
    if name in EMBEDDED_CORPORA:
        return None
    known = named_corpora() if CORPORA.is_file() else {}
    if name not in known:
        listed = ", ".join([*EMBEDDED_CORPORA, *known, *(own or ())])
        missing = "" if known else " (data/corpora.yaml is in the repository, not in an installed package)"
        raise CorpusError(
            f"unknown corpus {name!r}; allowed: {listed}, and what a profile defines under `texts`{missing}"
        )
    return known[name]
