"""More calibration samples than documents are long enough for, and samples that the model writes itself.

Shin et al. (arXiv 2406.15524) and Williams et al. (arXiv 2410.17170) prune with such samples. As a corpus for a
profile's `texts`, alone or beside others: python -m slimllm_nb.generated MODEL FILE.jsonl
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from slimllm_nb.calibration import tokenized
from slimllm_nb.checks import evaluation_mode
from slimllm_nb.command import command
from slimllm_nb.files import replacing, write_text
from slimllm_nb.progress import bar

FIRST_DROPPED = 32  # tokens: what stands behind nothing is unlike what stands in a text


def windows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, num_samples: int, length: int = 128, seed: int = 42
) -> Int[Tensor, "samples length"]:
    """`num_samples` windows that do not overlap, drawn from all documents cut into windows: larger calibration sets.

    Raises: ValueError when the texts do not hold that many windows; it names how many there are.
    """
    documents = tokenized(texts, tokenizer, num_samples, length)
    pieces = [ids[i : i + length] for ids in documents for i in range(0, len(ids) - length + 1, length)]
    if len(pieces) < num_samples:
        raise ValueError(
            f"{num_samples} samples of {length} tokens were asked for, but the {len(texts)} texts hold "
            f"{len(pieces)} windows of that length: give more texts, fewer samples or a smaller length"
        )
    return torch.tensor(random.Random(seed).sample(pieces, num_samples))


@torch.no_grad()
def generate_samples(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int = 32,
    length: int = 128,
    seed: int = 42,
    batch_size: int = 32,
    progress: bool = True,
) -> Int[Tensor, "samples length"]:
    """`num_samples` windows of `length` tokens, drawn from the model's distribution as it is (temperature 1).

    Each begins with the token between two documents (document_separator); the FIRST_DROPPED tokens behind it are
    dropped, and no text ends before its window does. The same seed gives the same samples on one machine; the random
    numbers that others draw stay as they are.
    Raises: ValueError for numbers out of range, and a tokenizer without such a token.
    """
    if num_samples < 1 or length < 2:
        raise ValueError(f"num_samples is {num_samples} and length {length}; allowed: at least 1 and at least 2")
    start = document_separator(tokenizer)
    own = model.generation_config.eos_token_id
    ends = {start, tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    drawn = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=FIRST_DROPPED + length,
        suppress_tokens=sorted(ends), pad_token_id=start,
    )  # fmt: skip
    found, batches = [], torch.full((num_samples, 1), start, device=model.device).split(batch_size)
    with torch.random.fork_rng(), evaluation_mode(model):
        torch.manual_seed(seed)
        for first in bar(batches, desc="generating samples", unit="batch", progress=progress):
            found.append(model.generate(first, attention_mask=torch.ones_like(first), generation_config=drawn).cpu())
    return torch.cat(found)[:, 1 + FIRST_DROPPED :].contiguous()


def document_separator(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands between two documents in training: <|endoftext|> where there is one (GPT-2, SmolLM, Qwen),
    else the beginning of a sequence (LLaMA), else its end. Raises: ValueError where there is none of them."""
    known = [tokenizer.get_vocab().get("<|endoftext|>"), tokenizer.bos_token_id, tokenizer.eos_token_id]
    if not (found := [one for one in known if one is not None]):
        raise ValueError("the tokenizer has no token that begins or ends a text: generated samples need one")
    return found[0]


def real_and_generated(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    model: Callable[[], LlamaForCausalLM],
    num_samples: int,
    generated: int,
    length: int,
    seed: int,
    keep: Path | None = None,
    progress: bool = True,
) -> Int[Tensor, "samples length"]:
    """windows(), and behind them `generated` samples of the model's own text, `num_samples` in all.

    model: gives it, where it is needed. keep: a file of the generated ones, written or read.
    Raises: ValueError as these two, and unless 0 <= generated <= num_samples.
    """
    real = num_samples - generated
    if generated < 0 or real < 0:
        raise ValueError(f"generated is {generated}; allowed: 0 to {num_samples}, the number of samples")
    found = [windows(texts, tokenizer, real, length, seed)] if real or not generated else []
    if generated and keep is not None and keep.is_file():
        found.append(load_file(keep)["samples"])
    elif generated:
        found.append(generate_samples(model(), tokenizer, generated, length, seed, progress=progress))
        if keep is not None:
            with replacing(keep) as partial:
                save_file({"samples": found[-1]}, partial)
    return torch.cat(found)


@command
def main(arguments: list[str] | None = None) -> int:
    """Write the model's own text into a .jsonl file, a document a line."""
    from slimllm_nb.sources import load_model, load_tokenizer

    parser = argparse.ArgumentParser(prog="python -m slimllm_nb.generated", description=main.__doc__)
    parser.add_argument("model", help='a folder with safetensors, a hub id, or "embedded"')
    parser.add_argument("file", type=Path, help="what is written, .jsonl")
    parser.add_argument("--documents", type=int, default=128, help="default: 128")
    parser.add_argument("--length", type=int, default=256, help="tokens of each (default: 256)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--revision", help="of a hub id")
    options = parser.parse_args(arguments)
    if options.file.suffix != ".jsonl":
        raise ValueError(f"{options.file} is to be written; allowed: a name that ends in .jsonl")
    if options.file.exists():
        raise ValueError(f"{options.file} is there already; allowed: the name of a file that is not")
    model = load_model(options.model, revision=options.revision, device=options.device)
    tokenizer = load_tokenizer(options.model, revision=options.revision)
    samples = generate_samples(model, tokenizer, options.documents, options.length, options.seed)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in tokenizer.batch_decode(samples)]
    write_text(options.file, "\n".join(lines) + "\n")
    print(f"{len(lines)} documents of {options.length} tokens. Written: {options.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
