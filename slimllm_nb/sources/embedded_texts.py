"""The embedded texts: Lee's news documents, a shortened dump of the English Wikipedia, Shakespeare's Hamlet, and four
debates of the presidential election of 2016.

The first two are split by document into a calibration and a held-out half. The others are held out whole: unlike all
that anything is calibrated on, and spoken.
"""

import csv
import gzip
import hashlib
import json
import re
from pathlib import Path

from slimllm_nb.corpora import NEVER_CALIBRATED
from slimllm_nb.files import cache_folder, write_text
from slimllm_nb.sources.packages import needing_extra, packaged_file, writing_to_cache

NEWS = "lee_background.cor"
WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
HAMLET = "hamlet.txt"
DEBATES = "presidential_debates_2016.csv.gz"


def embedded_texts(corpus: str, split: str) -> list[str]:
    """The documents of one half of an embedded corpus, in the corpus's own order, none twice.

    corpus: "news", "wikipedia", or what has no calibration half: "hamlet" (its 20 scenes), "debates" (all four);
    split: "calibration" (documents 0, 2, 4, ...) or "held-out" (1, 3, 5, ...). The halves share no document and are the
    same on every machine. News agencies send a report again with a few words changed, so a held-out document more than
    half of whose sequences of 8 words stand in calibration documents is left out.
    """
    if corpus in NEVER_CALIBRATED:
        return _hamlet() if corpus == "hamlet" else _debates()
    documents = _news() if corpus == "news" else _wikipedia()
    calibration, held_out = documents[::2], documents[1::2]
    return calibration if split == "calibration" else _without_near_copies(held_out, calibration)


def _without_near_copies(documents: list[str], seen: list[str], words: int = 8) -> list[str]:
    """The documents less than half of whose sequences of 8 words occur in the `seen` ones."""

    def sequences(document: str) -> set[tuple[str, ...]]:
        parts = document.split()
        return {tuple(parts[i : i + words]) for i in range(len(parts) - words + 1)}

    known = set().union(*map(sequences, seen))
    return [one for one in documents if 2 * len(sequences(one) & known) <= len(sequences(one))]


def _news() -> list[str]:
    """Lee's 300 news documents, one a line, without the 7 that occur before."""
    lines = packaged_file(NEWS).read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def _hamlet() -> list[str]:
    """The play's scenes, each with its heading; titles and the headings of acts are left out."""
    _, *scenes = re.split(r"^(?=SCENE )", packaged_file(HAMLET).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [re.sub(r"^ACT [IV]+$", "", scene, flags=re.MULTILINE).strip() for scene in scenes]


def _debates() -> list[str]:
    """Each debate as its transcript has it: SPEAKER: what was said, one a paragraph."""
    with gzip.open(packaged_file(DEBATES), "rt", encoding="utf-8", newline="") as stream:
        debates: dict[str, list[str]] = {}
        for line in csv.DictReader(stream):
            debates.setdefault(line["debate"], []).append(f"{line['speaker']}: {line['statement'].strip()}")
    return ["\n\n".join(said) for said in debates.values()]


def _wikipedia() -> list[str]:
    """The dump's articles as prose; cleaned once (8 s) and then read from a JSON file in the cache."""
    with needing_extra("embedded", "the Wikipedia corpus"):
        from slimllm_nb.sources import articles
    path = cache_folder() / f"wikipedia-{articles.VERSION}.json"
    if (texts := _read_texts(path)) is not None:
        return texts
    texts = [prose for _, prose in articles.read_articles(packaged_file(WIKIPEDIA))]
    with writing_to_cache("the Wikipedia corpus"):
        write_text(path, json.dumps({"sha256": _digest(texts), "texts": texts}, ensure_ascii=False, indent=0))
    return texts


def _read_texts(path: Path) -> list[str] | None:
    """The texts of a cached file; None where it is missing or damaged, which cleaning the dump again repairs."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["texts"] if content["sha256"] == _digest(content["texts"]) else None
    except (OSError, ValueError, KeyError, TypeError):  # not there, not JSON, or JSON of another shape
        return None


def _digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
