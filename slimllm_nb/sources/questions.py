"""Multiple-choice questions made from the embedded texts, the same on every machine; data/tasks hands them to lm-eval.

Nothing but what a question asks tells its answer: the right choice stands at each of the four places equally often, and
its length says nothing. Wrong choices come from the same source as right ones, so a model that looks at the choices
alone is at chance, 0.25.
"""

import random
import re
from collections.abc import Iterator

from slimllm_nb.sources.packages import packaged_file
from slimllm_nb.sources.texts import load_texts

CHOICES = 4
ANALOGIES = "questions-words.txt"
# capital-common-countries is left out: all its pairs stand in capital-world as well.
REPEATED = "capital-common-countries"
SHOTS = 2  # pairs of the same section shown before the question

CONTEXT_SENTENCES = 2
CHARACTERS = (50, 190)  # of a sentence that is shown or asked for; wrong choices may be a little shorter or longer
SLACK = 25
PER_DOCUMENT = 3
# A full stop, perhaps a closing quote, then a capital; but not after a title.
SENTENCE_END = re.compile(r'(?:(?<=[.!?])|(?<=[.!?]"))(?<!\bMr\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bMs\.)\s+(?=["A-Z])')


def analogies() -> list[dict]:
    """The Google analogy questions (Mikolov et al. 2013), each pair of words asked for once.

    Rows: `section`, `query` ("Athens is to Greece as ... Oslo is to"), `choices` (four second words of the section,
    none of them in the query) and `answer` (the index of the right one). Raises: SourceError when the file is not
    there.
    """
    rows = []
    for section, pairs in _sections().items():
        for pair in pairs:
            rows.append(_analogy(section, pair, pairs, random.Random(f"{section} {pair}")))
    return _in_order(rows, "analogies")


def continuations() -> list[dict]:
    """Held-out news: which of four sentences comes after these two.

    Rows: `query` (two sentences that follow each other), `choices` and `answer`. Wrong choices are sentences of other
    held-out documents, never a first sentence (the right one is none either). In a quarter of the questions each the
    right choice is the shortest, second, third and longest of the four; the others are the nearest to it in length
    among a random half. Raises: SourceError when the texts are not there.
    """
    documents = [SENTENCE_END.split(text) for text in load_texts("news", "held-out")]
    # Every sentence once: agencies repeat themselves.
    pool = {s: index for index, sentences in enumerate(documents) for s in sentences[1:] if _usable(s, SLACK)}
    asked = list(_passages(documents))
    ranks = [rank % CHOICES for rank in range(len(asked))]
    random.Random("ranks").shuffle(ranks)
    rows = []
    for (document, query, right), rank in zip(asked, ranks, strict=True):
        wrong = _near_in_length(
            right, rank, [s for s, index in pool.items() if index != document], random.Random(query)
        )
        rows.append({"query": query, "right": right, "wrong": wrong})
    return _in_order(rows, "continuations")


def _sections() -> dict[str, list[tuple[str, str]]]:
    """The distinct pairs of every section, in the order of the file."""
    sections: dict[str, dict[tuple[str, str], None]] = {}
    for line in packaged_file(ANALOGIES).read_text(encoding="utf-8").splitlines():
        if line.startswith(":"):
            section = sections.setdefault(line.removeprefix(":").strip(), {})
        else:
            first, second, third, fourth = line.split()
            section |= dict.fromkeys([(first, second), (third, fourth)])
    del sections[REPEATED]
    return {name: list(pairs) for name, pairs in sections.items()}


def _analogy(section: str, pair: tuple[str, str], pairs: list[tuple[str, str]], generator: random.Random) -> dict:
    others = [other for other in pairs if other[0] != pair[0] and other[1] != pair[1]]
    shown = generator.sample(others, SHOTS)
    words = {word for other in [*shown, pair] for word in other}
    # Right for this word too (a city's name stands in two states), or in sight already: no wrong choice.
    allowed = sorted({second for _, second in others} - words - {b for a, b in pairs if a == pair[0]})
    query = ", as ".join(f"{a} is to {b}" for a, b in shown) + f", as {pair[0]} is to"
    return {"section": section, "query": query, "right": pair[1], "wrong": generator.sample(allowed, CHOICES - 1)}


def _usable(sentence: str, slack: int = 0) -> bool:
    # An uneven number of quotation marks: half of what somebody said.
    return CHARACTERS[0] - slack <= len(sentence) <= CHARACTERS[1] + slack and sentence.count('"') % 2 == 0


def _passages(documents: list[list[str]]) -> Iterator[tuple[int, str, str]]:
    """Document, two sentences, the next one; passages of a document do not overlap."""
    for index, sentences in enumerate(documents):
        start = found = 0
        while start + CONTEXT_SENTENCES < len(sentences) and found < PER_DOCUMENT:
            *context, right = sentences[start : start + CONTEXT_SENTENCES + 1]
            if all(map(_usable, [*context, right])):
                yield index, " ".join(context), right
                found += 1
                start += CONTEXT_SENTENCES
            start += 1


def _near_in_length(right: str, rank: int, pool: list[str], generator: random.Random) -> list[str]:
    """`rank` sentences that are shorter than the right one, the others longer."""
    pool = sorted(generator.sample(pool, len(pool) // 2), key=lambda sentence: abs(len(sentence) - len(right)))
    shorter = [sentence for sentence in pool if len(sentence) < len(right)][:rank]
    longer = [sentence for sentence in pool if len(sentence) > len(right)][: CHOICES - 1 - rank]
    return shorter + longer


def _in_order(rows: list[dict], salt: str) -> list[dict]:
    """Shuffled, so that the first hundred are like the rest; the right choice at each place equally often."""
    generator = random.Random(salt)
    generator.shuffle(rows)
    places = [index % CHOICES for index in range(len(rows))]
    generator.shuffle(places)
    shuffled = []
    for row, place in zip(rows, places, strict=True):
        right, wrong = row.pop("right"), row.pop("wrong")
        generator.shuffle(wrong)
        shuffled.append({**row, "choices": [*wrong[:place], right, *wrong[place:]], "answer": place})
    return shuffled
