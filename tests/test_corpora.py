"""Corpora that are not embedded: what data/corpora.yaml asks the hub for, data sets in a folder, files of your own."""

import json

import datasets
import pytest
from pydantic import ValidationError

from slimllm_nb.corpora import CorpusError, TextSource, find_corpus, named_corpora
from slimllm_nb.sources import SourceError, load_texts
from slimllm_nb.sources.hub import HUB_VARIABLE

# As the pages of the data sets on the hub have them: id, config, revision, files, split, column.
ASKED = {
    "bookcorpus": ("bookcorpus/bookcorpus", None, "refs/convert/parquet", "plain_text/*train/*.parquet",
                   "train", "text"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None, None, "test", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", None, "refs/convert/parquet", "penn_treebank/validation/*.parquet",
            "validation", "sentence"),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_what_the_hub_is_asked_for(name, monkeypatch):
    dataset, config, revision, files, split, column = ASKED[name]
    asked = {}

    def load_dataset(path, config=None, **options):
        asked.update(options, path=path, config=config)
        return datasets.Dataset.from_dict({column: ["x" * 500] * 3 + ["short"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    texts = load_texts(name, "held-out")
    assert len(texts) == (3 if name == "bookcorpus" else 4)
    assert (asked["path"], asked["config"], asked["split"]) == (dataset, config, split)
    assert asked["revision"] == (revision or named_corpora()[name].revision)
    assert asked.get("data_files") == (files and {split: files})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in the place of the hub, with Penn Treebank's columns and splits."""
    folder = tmp_path / "hub" / "datasets" / "ptb-text-only" / "ptb_text_only" / "penn_treebank" / "validation"
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict({"sentence": ["no it was n't black monday", "", "<unk> N"]}).to_parquet(
        folder / "0000.parquet"
    )
    monkeypatch.setenv(HUB_VARIABLE, str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def test_a_folder_in_the_place_of_the_hub(hub):
    assert load_texts("ptb", "held-out") == ["no it was n't black monday", "", "<unk> N"]


def test_a_column_that_is_not_there(hub):
    own = {"mine": TextSource(dataset=str(hub / "hub/datasets/ptb-text-only/ptb_text_only"),
                              data_files="penn_treebank/validation/*.parquet", column="text")}  # fmt: skip
    with pytest.raises(SourceError, match="has no column 'text'; it has: sentence"):
        load_texts("mine", "held-out", own)


def test_files_of_your_own(tmp_path):
    paragraphs = [f"Paragraph {number} " + "word " * 150 for number in range(7)]  # of about 760 characters
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"body": f"document {n}"}) for n in range(9)))
    own = {
        "book": TextSource(files=[str(tmp_path / "book.txt")]),
        "rows": TextSource(files=[str(tmp_path / "rows.jsonl")], column="body", max_documents=4),
    }
    passages = load_texts("book", "calibration", own)
    assert [text.count("Paragraph") for text in passages] == [3, 3, 1]
    assert "\n\n".join(passages) == "\n\n".join(paragraphs)
    rows = load_texts("rows", "held-out", own)
    assert len(rows) == 4 and rows == sorted(rows) and rows == load_texts("rows", "calibration", own)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "cannot read the text file .*gone.txt"),
        ("bad.jsonl", '{"text": 1', "must hold one JSON object with 'text' a line"),
        ("other.jsonl", '{"body": "x"}', "must hold one JSON object with 'text' a line: KeyError"),
        ("empty.txt", "\n\n", "the corpus 'mine' has no document"),
    ],
)
def test_files_that_cannot_be_read(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=message):
        load_texts("mine", "held-out", {"mine": TextSource(files=[str(tmp_path / name)])})


def test_names():
    assert find_corpus("news") is None
    assert find_corpus("news", {"news": TextSource(files=["a.txt"])}).files == ["a.txt"]
    with pytest.raises(CorpusError, match="unknown corpus 'c4'; allowed: news, wikipedia, hamlet, debates, bookcorpus"):
        find_corpus("c4")


@pytest.mark.parametrize("fields", [{}, {"dataset": "a/b", "files": ["a.txt"]}, {"files": ["a.pdf"]}, {"files": []}])
def test_a_source_is_one_place(fields):
    with pytest.raises(ValidationError):
        TextSource(**fields)
