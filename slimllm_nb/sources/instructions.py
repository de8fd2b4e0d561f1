"""Instructions and their responses, for the paper's recovery training (section 5.1: cleaned Alpaca)."""

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimllm_nb.recipe import IGNORED
from slimllm_nb.sources.hub import load_rows
from slimllm_nb.sources.packages import SourceError

COLUMNS = ("instruction", "input", "output")
# Alpaca's own template (github.com/tatsu-lab/stanford_alpaca): with an input, and without one.
CONTEXT = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
WITH_INPUT = CONTEXT.format(", paired with an input that provides further context")
WITH_INPUT += "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
WITHOUT = CONTEXT.format("") + "### Instruction:\n{instruction}\n\n### Response:\n"


def load_instructions(dataset: str, revision: str | None = None) -> list[dict[str, str]]:
    """Rows with `instruction`, `input` and `output` of the split "train". dataset: a hub id, or a folder laid out like
    one. Raises: SourceError for what cannot be loaded or has other columns."""
    rows = load_rows(dataset, "train", revision=revision)
    if missing := [column for column in COLUMNS if column not in rows.column_names]:
        raise SourceError(
            f"the data set {dataset!r} has no column {', '.join(missing)}; it has: {', '.join(rows.column_names)}"
        )
    return rows.to_list()


def prompt(row: Mapping[str, str]) -> str:
    """What is asked, in Alpaca's template."""
    return (WITH_INPUT if row["input"] else WITHOUT).format(**{name: row[name] for name in COLUMNS[:2]})


def instruction_sample(
    row: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[Int[Tensor, "tokens"], Int[Tensor, "tokens"]]:
    """Token ids of prompt, response and end of text, cut to `length`, and labels: the response's and the end's alone.

    The prompt is tokenized by itself, so that no token holds the end of it and the beginning of the response.
    """
    asked = tokenizer(prompt(row))["input_ids"]
    if asked and asked[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        asked = asked[:-1]
    answer = [*tokenizer(row["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids, labels = torch.tensor([*asked, *answer]), torch.tensor([*[IGNORED] * len(asked), *answer])
    return ids[:length], labels[:length]
