"""What is compared, and what it is calibrated and judged on."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, model_validator

from slimllm_nb.corpora import EMBEDDED_CORPORA, NEVER_CALIBRATED, SET_ASIDE, TextSource, find_corpus
from slimllm_nb.fingerprint import digest
from slimllm_nb.methods import Method, MethodLike, as_method
from slimllm_nb.reproduce.differences import BASELINE
from slimllm_nb.reproduce.profiles import Profile
from slimllm_nb.settings import Settings
from slimllm_nb.sources import SPLITS, load_texts

GENERATED = "generated"  # to be judged on: the dense model's own text
Names = Annotated[tuple[str, ...], Field(min_length=1)]


class Protocol(Settings):
    """Samples: `num_samples` windows of `length` tokens, drawn with the seed from the calibration halves of all of
    `calibrate_on` (calibration.windows); in the place of `generated` of them the dense model's own text
    (generated.generate_samples). Perplexity as in evaluation.token_blocks, on each of `judge_on` (judges.py)."""

    calibrate_on: Names
    judge_on: Names
    num_samples: int = Field(ge=1)
    generated: int = Field(default=0, ge=0)
    length: int = Field(ge=2)
    block_length: int = Field(ge=2)
    max_tokens: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _not_more_than_all(self):
        if self.generated > self.num_samples:
            raise ValueError(f"generated is {self.generated}; allowed: 0 to {self.num_samples}, the number of samples")
        return self

    def calibrated(self, corpus: str) -> bool:
        """Whether calibration samples come from this corpus (from other documents of it)."""
        return corpus in self.calibrate_on and self.generated < self.num_samples

    def calibration_texts(self, own: Mapping[str, TextSource] | None = None) -> list[str]:
        """The documents of all that is calibrated on. own: a profile's texts."""
        return [text for corpus in self.calibrate_on for text in load_texts(corpus, "calibration", own)]


def corpus_and_half(name: str) -> tuple[str, str]:
    """Of what is judged on: "news" is the held-out half of news, "news:calibration" the other one. Raises: ValueError
    for another half."""
    corpus, _, half = name.partition(":")
    if half not in ("", *SPLITS):
        raise ValueError(f"{name!r} names no half of {corpus}; allowed behind the colon: {', '.join(SPLITS)}")
    return corpus, half or "held-out"


def judged_corpora(judge_on: Sequence[str]) -> list[str]:
    """The corpora that texts are read from to be judged on."""
    return [corpus_and_half(one)[0] for one in judge_on if one != GENERATED]


def protocol_of(
    profile: Profile,
    calibrate_on: Sequence[str] | None = None,
    judge_on: Sequence[str] | None = None,
    num_samples: int | None = None,
    generated: int = 0,
) -> Protocol:
    """A profile's calibration and evaluation, but for what is given.

    Where the profile works with the embedded texts: calibrated on all that have a calibration half, judged on all but
    those set aside, so that every table shows a corpus that was not calibrated on.
    Raises: ValueError for an unknown corpus (CorpusError), one that may not be calibrated on, and one that
    is not split in halves and would be calibrated and judged on.
    """
    calibration, evaluation = profile.calibration, profile.evaluation
    embedded = set(EMBEDDED_CORPORA) - set(profile.texts)
    if calibrate_on is None:
        halves = [corpus for corpus in EMBEDDED_CORPORA if corpus in embedded - set(NEVER_CALIBRATED)]
        calibrate_on = halves if calibration.corpus in embedded else [calibration.corpus]
    if judge_on is None:
        others = [one for one in EMBEDDED_CORPORA if one in embedded - {*evaluation.corpora, *SET_ASIDE}]
        judge_on = [*evaluation.corpora, *(others if embedded & set(evaluation.corpora) else [])]
    for corpus in (*calibrate_on, *judged_corpora(judge_on)):
        find_corpus(corpus, profile.texts)
    if wrong := set(calibrate_on) & embedded & set(NEVER_CALIBRATED):
        raise ValueError(f"{', '.join(sorted(wrong))} is for judging alone: name another corpus to calibrate on")
    seen = {one for one, half in map(corpus_and_half, judge_on) if half != "held-out" or one not in embedded}
    if both := set(calibrate_on) & seen:
        raise ValueError(f"{', '.join(sorted(both))} would be calibrated and judged on: name two corpora")
    return Protocol(
        calibrate_on=tuple(calibrate_on),
        judge_on=tuple(judge_on),
        num_samples=calibration.num_samples if num_samples is None else num_samples,
        generated=generated,
        length=calibration.length,
        block_length=evaluation.block_length,
        max_tokens=evaluation.max_tokens,
    )


def named(methods: Sequence[MethodLike]) -> dict[str, Method]:
    """The methods by name, SlimLLM first."""
    found = {BASELINE: as_method(BASELINE)}
    for method in map(as_method, methods):
        if method.name == BASELINE and digest(parts=method.identity) == digest(parts=found[BASELINE].identity):
            continue
        if method.name in found:
            raise ValueError(f"two methods are called {method.name!r}: give one another 'name'")
        found[method.name] = method
    return found
