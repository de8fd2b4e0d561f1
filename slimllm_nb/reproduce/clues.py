"""Why a dense model may not be the published one: everything that a number silently depends on, changed in turn."""

from collections.abc import Iterator
from importlib.metadata import version

from slimllm_nb.corpora import find_corpus
from slimllm_nb.reproduce.claims import load_claims
from slimllm_nb.reproduce.profiles import Profile
from slimllm_nb.reproduce.published import NOTEBOOK, tolerances
from slimllm_nb.reproduce.verdicts import Verdict

SPLITS = {"test": "validation", "validation": "test"}


def find_clues(profile: Profile, model, tokenizer, texts, metrics, off: list[Verdict], others: dict) -> Iterator[str]:
    """What was used; the perplexities that are off with one thing changed at a time; accuracies by other metrics.

    texts, metrics: of the corpora by name, of the dense model by name; off: the verdicts on the dense model that do not
    hold; others: all of lm-eval's numbers, by task.
    """
    yield from _settings(profile, model, tokenizer)
    yield from _tried(profile, model, tokenizer, texts, metrics, off)
    yield from _other_metrics(off, others)


def _settings(profile: Profile, model, tokenizer) -> Iterator[str]:
    """Everything that a published number silently depends on."""
    probe = "The quick brown fox, 42 of them (or <unk>?), didn't jump."
    ids = tokenizer(probe)["input_ids"]
    back = tokenizer.decode(ids, skip_special_tokens=True).strip()
    given_back = "gives a text back" if back == probe else f"turns {probe!r} into {back!r}"
    vocabulary = model.config.vocab_size
    kind = type(tokenizer).__name__
    yield f"tokenizer: {kind} with {len(tokenizer):,} tokens (the model has {vocabulary:,}), {given_back}"
    own = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    asked = (
        own if profile.zeroshot is None or profile.zeroshot.add_bos_token is None else profile.zeroshot.add_bos_token
    )
    yield f"beginning-of-sequence token: in front of a text {_yes(own)}, in front of a question {_yes(asked)}"
    yield f"split: {', '.join(f'{name} {_split(profile, name)}' for name in profile.evaluation.corpora)}"
    yield "join: documents joined by a blank line"
    limit = profile.evaluation.max_tokens
    part = "all tokens" if limit is None else f"at most {limit:,} tokens of each corpus (the paper scores all)"
    yield f"block length: {profile.evaluation.block_length} tokens (the paper: 128), {part}"
    yield f"lm-eval: {version('lm-eval')} (the paper: 0.3.0)"


def _tried(profile, model, tokenizer, texts, metrics, off: list[Verdict]) -> Iterator[str]:
    """Perplexity of the corpora that are off, with one thing changed at a time."""
    from slimllm_nb import evaluation

    published = {claim.left: claim.right for claim in load_claims(NOTEBOOK, profile)}
    wrong = {one.id for one in off}
    margin = tolerances()["perplexity"].margin
    for name, documents in texts.items():
        key = f"ppl_dense_{name}"
        if f"{profile.name}-dense-{name}_ppl" not in wrong:
            continue
        if metrics[key] > model.config.vocab_size / 2:
            yield (
                f"{name}: {metrics[key]:,.0f} is close to guessing among {model.config.vocab_size:,} tokens: the "
                "tokenizer gives other numbers than the model was trained with"
            )
        for change, blocks in _variants(profile, model, tokenizer, name, documents):
            found = evaluation.perplexity(model, blocks)
            fits = abs(found - published[key]) <= margin * published[key]
            yield f"{name}, {change}: {found:.2f}{' - THIS FITS the published ' + str(published[key]) if fits else ''}"


def _variants(profile: Profile, model, tokenizer, name: str, documents: list[str]):
    import torch

    from slimllm_nb import evaluation, sources

    limits = (profile.evaluation.block_length, profile.evaluation.max_tokens)
    flipped = profile.tokenizing | {"split_special_tokens": not profile.split_special_tokens}
    read = "the token they look like" if profile.split_special_tokens else "characters"
    other = sources.load_tokenizer(profile.model, **flipped)
    yield f"special tokens in the text read as {read}", evaluation.token_blocks(documents, other, *limits)
    blocks = evaluation.token_blocks(documents, tokenizer, *limits)
    if tokenizer.bos_token_id is not None:
        first = torch.full((len(blocks), 1), tokenizer.bos_token_id)
        yield "a beginning-of-sequence token in front of every block", torch.cat([first, blocks[:, :-1]], dim=1)
    for between, words in (("\n", "a line break"), (" ", "a space")):
        yield f"documents joined by {words}", evaluation.token_blocks([between.join(documents)], tokenizer, *limits)
    for length in {128, min(2048, model.config.max_position_embeddings)} - {profile.evaluation.block_length}:
        try:
            yield f"blocks of {length} tokens", evaluation.token_blocks(documents, tokenizer, length, limits[1])
        except ValueError:  # the text is shorter
            continue
    if (split := _split(profile, name)) in SPLITS:
        own = {name: _other_split(profile, name, split)}
        try:
            texts = sources.load_texts(name, "held-out", own)
        except sources.SourceError:  # there is no such split
            return
        yield f"the {SPLITS[split]} split", evaluation.token_blocks(texts, tokenizer, *limits)


def _other_split(profile: Profile, name: str, split: str):
    source = find_corpus(name, profile.texts)
    files = source.data_files and source.data_files.replace(split, SPLITS[split])
    return source.model_copy(update={"split": SPLITS[split], "data_files": files})


def _split(profile: Profile, name: str) -> str:
    source = find_corpus(name, profile.texts)
    return "held-out half" if source is None else "your files" if source.files else source.split


def _other_metrics(off: list[Verdict], others: dict) -> Iterator[str]:
    """Accuracies that are off, by the metrics of lm-eval that were not taken."""
    for one in off:
        task = one.id.rpartition("-")[2]
        for name, value in others.get(task, {}).items():
            kind = name.removesuffix(",none")
            if kind in ("acc", "acc_norm") and value != one.left:
                yield f"{task}: lm-eval's {kind} would be {value:.4f}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
