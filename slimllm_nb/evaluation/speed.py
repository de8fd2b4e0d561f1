"""What pruning buys: measured speed (paper Table 3)."""

import statistics
import time
from collections.abc import Mapping, Sequence

import pandas
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from slimllm_nb.checks import require_llama
from slimllm_nb.progress import bar as progress_bar

FIRST_TOKEN = "time to first token (s)"
TOKENS_PER_SECOND = "tokens per second"


@torch.no_grad()
def measure_speed(
    models: Mapping[str, LlamaForCausalLM],
    *,
    batch_sizes: Sequence[int] = (1, 8),
    prompt_length: int = 256,
    new_tokens: int = 32,
    repeats: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> pandas.DataFrame:
    """Time to first token, and tokens per second after it, of several models side by side.

    In every repeat all models run one after the other, in turning order, so that whatever else slows the machine down
    meets all of them; one round before the first is not counted. A run: a random prompt of `prompt_length` tokens
    through the model (its end is the first token), then `new_tokens` - 1 greedy tokens, one by one, with KV cache.

    Rows: model, batch, measure, median, lowest, highest, and speed-up against the first model: the median over the
    repeats of the ratio of both, above 1 where the model is faster, below 1 where it is slower. Paper Table 3 (there:
    one V100, 256 tokens in; 256 tokens out at batch 8; means of 20 runs).

    Raises: ValueError for no model, settings out of range, an architecture other than LLaMA's, and more tokens than a
    model's limit.
    """
    _check(models, batch_sizes, prompt_length, new_tokens, repeats)
    names = list(models)
    vocabulary = min(model.config.vocab_size for model in models.values())
    generator = torch.Generator().manual_seed(seed)
    times = {(name, size): [] for name in names for size in batch_sizes}
    with progress_bar(total=(repeats + 1) * len(times), desc="speed", progress=progress) as bar:
        for repeat in range(repeats + 1):
            turn = repeat % len(names)
            for size in batch_sizes:
                prompt = torch.randint(vocabulary, (size, prompt_length), generator=generator)
                for name in names[turn:] + names[:turn]:
                    taken = _run(models[name], prompt, new_tokens)
                    if repeat:  # the first round warms up
                        times[name, size].append(taken)
                    bar.update()
    rows = []
    for size in batch_sizes:
        for index, measure in enumerate((FIRST_TOKEN, TOKENS_PER_SECOND)):
            base = [taken[index] for taken in times[names[0], size]]
            for name in names:
                values = [taken[index] for taken in times[name, size]]
                ratios = [value / other for value, other in zip(values, base, strict=True)]
                median = statistics.median(ratios)
                rows.append(
                    {
                        "model": name,
                        "batch": size,
                        "measure": measure,
                        "median": statistics.median(values),
                        "lowest": min(values),
                        "highest": max(values),
                        "speed-up": 1 / median if measure == FIRST_TOKEN else median,
                    }
                )
    return pandas.DataFrame(rows)


def _run(model: LlamaForCausalLM, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, tokens per second after it."""
    prompt = prompt.to(model.device)
    start = _now(model)
    output = model(prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    first = _now(model)
    for _ in range(new_tokens - 1):
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    return first - start, len(prompt) * (new_tokens - 1) / (_now(model) - first)


def _now(model: LlamaForCausalLM) -> float:
    """The clock, read when the device has done all that it was asked for."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    return time.perf_counter()


def _check(models, batch_sizes, prompt_length, new_tokens, repeats) -> None:
    if not models or not batch_sizes or min(*batch_sizes, prompt_length, repeats) < 1 or new_tokens < 2:
        raise ValueError(
            f"{len(models)} models, batch_sizes {tuple(batch_sizes)}, prompt_length {prompt_length}, new_tokens "
            f"{new_tokens}, repeats {repeats}; allowed: at least one model and batch size, 2 new tokens, the others "
            "from 1"
        )
    for name, model in models.items():
        require_llama(model)
        limit = model.config.max_position_embeddings
        if prompt_length + new_tokens > limit:
            raise ValueError(
                f"prompt_length {prompt_length} and new_tokens {new_tokens} make {prompt_length + new_tokens} tokens; "
                f"the limit of the model {name!r} is {limit}"
            )
