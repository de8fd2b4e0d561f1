"""The dense gate: measure the dense model, and ask whether it is the published one, before anything is pruned.

Model, texts and questions are fetched, and the dense model is measured as notebook 06 will measure the pruned ones.
Where a number is off, everything that it silently depends on is listed.
"""

import json
import os
import sys
import time
from importlib.metadata import version

from slimllm_nb.corpora import find_corpus
from slimllm_nb.files import write_text
from slimllm_nb.reproduce.claims import NOTEBOOK
from slimllm_nb.reproduce.profiles import Profile, run_folder
from slimllm_nb.reproduce.verdicts import FAILS, Verdict, judge

FILE, ALLOW = "dense.json", "ALLOW_DENSE_MISMATCH"


def gate(profile: Profile) -> int:
    """1 where the dense model that was measured is not the published one, unless ALLOW_DENSE_MISMATCH=1 says to go on
    with every verdict marked."""
    path = run_folder(profile.name) / FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    if not content["off"]:
        return 0
    print(explain(content, profile), file=sys.stderr, flush=True)
    if os.environ.get(ALLOW) == "1":
        return 0
    print(
        f"Stopped: nothing was pruned: mend the profile, or set {ALLOW}=1 to go on all the same (every verdict is then "
        f"marked). All of it is in {path}",
        file=sys.stderr,
    )
    return 1


def measure(profile: Profile) -> None:
    """Write dense.json into the run folder: metrics, the rows of the zero-shot table, what is off, what was used."""
    from slimllm_nb import evaluation, sources

    print("dense model ...", flush=True)
    start, path = time.perf_counter(), run_folder(profile.name) / FILE
    path.unlink(missing_ok=True)
    tokenizer, _, blocks = load_inputs(profile)
    model = sources.load_model(profile.model, **profile.loading)
    _check_layers(profile, model)
    metrics = {}
    for name, one in blocks.items():
        metrics[f"ppl_dense_{name}"] = evaluation.perplexity(model, one)
        print(f"dense model, perplexity on {name}: {metrics[f'ppl_dense_{name}']:.2f}", flush=True)
    rows = []
    if profile.zeroshot:
        from slimllm_nb.evaluation.zeroshot import zeroshot
        from slimllm_nb.reproduce.metrics import accuracies

        asked = profile.zeroshot
        table = zeroshot(model, tokenizer, asked.tasks, limit=asked.limit, add_bos_token=asked.add_bos_token)
        rows = table.to_dict("records")
        metrics |= accuracies(table.assign(model="dense"))
        print(table.to_string(index=False), flush=True)
    off = not_as_published(metrics, profile)
    content = {
        "profile": profile.name,
        "metrics": metrics,
        "zeroshot": rows,
        "off": [*map(line, off), *(_guessing(metrics, model.config.vocab_size) if off else [])],
        "used": _used(profile, model, tokenizer),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seconds": round(time.perf_counter() - start),
    }
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def load_inputs(profile: Profile):
    """The tokenizer, the calibration samples, and the blocks of every corpus that is judged on. What pruning will need
    is asked for with the rest: said now if it cannot be had."""
    from slimllm_nb import sources
    from slimllm_nb.calibration import draw_samples

    tokenizer, wanted = sources.load_tokenizer(profile.model, **profile.tokenizing), profile.calibration
    texts = sources.load_texts(wanted.corpus, "calibration", profile.texts)
    input_ids = draw_samples(texts, tokenizer, wanted.num_samples, wanted.length, profile.seed)
    return tokenizer, input_ids, held_out_blocks(profile, tokenizer)


def held_out_blocks(profile: Profile, tokenizer) -> dict:
    """What perplexity is measured on, by corpus."""
    from slimllm_nb import evaluation, sources

    limits, blocks = (profile.evaluation.block_length, profile.evaluation.max_tokens), {}
    for name in profile.evaluation.corpora:
        documents = sources.load_texts(name, "held-out", profile.texts)
        blocks[name] = evaluation.token_blocks(documents, tokenizer, *limits)
    return blocks


def not_as_published(metrics: dict[str, float], profile: Profile) -> list[Verdict]:
    """The published numbers of the dense model that these metrics miss."""
    return [one for one in judge(NOTEBOOK, metrics, profile) if "-dense-" in one.id and one.verdict == FAILS]


def line(missed: Verdict) -> str:
    """What was measured beside what is published."""
    return f"{missed.claim}: measured {missed.measured}, published {missed.paper} ({missed.tolerance})"


def explain(content: dict, profile: Profile) -> str:
    """What is off and what was used, for the screen."""
    source = f"{profile.published.source}, {profile.published.dense}"
    lines = [f"The dense model is not the one that the paper measured ({source}):"]
    lines += [f"  - {line}" for line in content["off"]]
    lines += ["What was used:", *(f"  - {line}" for line in content["used"])]
    return "\n".join(lines)


def _check_layers(profile: Profile, model) -> None:
    layers = len(model.model.layers)
    for key, setting in profile.settings.items():
        if setting.pruned_layers > layers:
            raise ValueError(
                f"settings.{key}.pruned_layers is {setting.pruned_layers}; allowed: 0 to {layers}, the model's layers"
            )


def _guessing(metrics: dict[str, float], vocabulary: int) -> list[str]:
    return [
        f"{name}: {value:,.0f} is close to guessing among {vocabulary:,} tokens: the tokenizer gives other numbers "
        "than the model was trained with"
        for name, value in metrics.items()
        if name.startswith("ppl_") and value > vocabulary / 2
    ]


def _used(profile: Profile, model, tokenizer) -> list[str]:
    """Everything that a published number silently depends on."""
    probe = "The quick brown fox, 42 of them (or <unk>?), didn't jump."
    ids = tokenizer(probe)["input_ids"]
    back = tokenizer.decode(ids, skip_special_tokens=True).strip()
    given_back = "gives a text back" if back == probe else f"turns {probe!r} into {back!r}"
    begins = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    asked = profile.zeroshot and profile.zeroshot.add_bos_token
    sources = {name: find_corpus(name, profile.texts) for name in profile.evaluation.corpora}
    splits = [
        f"{name} {'held-out half' if one is None else 'your files' if one.files else one.split}"
        for name, one in sources.items()
    ]
    limit, length = profile.evaluation.max_tokens, profile.evaluation.block_length
    return [
        f"tokenizer: {type(tokenizer).__name__} with {len(tokenizer):,} tokens (the model has "
        f"{model.config.vocab_size:,}), {given_back}; special tokens in a text are read as "
        f"{'characters' if profile.split_special_tokens else 'the tokens they look like'}",
        f"beginning-of-sequence token: {'' if begins else 'not '}in front of a text; in front of a question: "
        f"{'as the tokenizer does' if asked is None else asked}",
        f"split: {', '.join(splits)}; documents joined by a blank line",
        f"block length: {length} tokens (the paper: 128), {'all' if limit is None else f'at most {limit:,}'} tokens",
        f"lm-eval: {version('lm-eval')} (the paper: 0.3.0)",
    ]
