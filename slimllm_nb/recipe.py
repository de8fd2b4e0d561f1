"""How a pruned model is trained (tuning.py): settings alone, so that a profile can be read without PyTorch."""

from pydantic import Field, model_validator

from slimllm_nb.settings import Settings

IGNORED = -100  # a label that the loss leaves out


class Recipe(Settings):
    """LoRA as in the paper's rows "w/ tune". Its section 5.1 names epochs, learning_rate and batch_size (the authors'
    script: 16); rank (their script: 4), alpha, dropout, samples held out and warm-up are those of LLM-Pruner's script,
    which both follow.

    samples: how many are drawn to be trained on (None: all others); held_out: to measure the validation loss on.
    batch_size: samples a step; at_once: how many of them are computed at a time. warmup: share of the steps in which
    the learning rate rises; then it falls in a straight line to 0. evaluations: how often the validation loss is
    measured; the weights with the lowest are those that are kept.
    """

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    epochs: float = Field(default=2, gt=0)
    samples: int | None = Field(default=None, ge=1)
    held_out: int = Field(default=2000, ge=1)
    batch_size: int = Field(default=64, ge=1)
    at_once: int = Field(default=16, ge=1)
    warmup: float = Field(default=0.06, ge=0, lt=1)
    evaluations: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _whole_batches(self):
        if self.at_once < self.batch_size and self.batch_size % self.at_once:
            raise ValueError(f"at_once is {self.at_once}; allowed: what divides batch_size, {self.batch_size}, or more")
        return self


class Tuning(Settings):
    """What a profile's pruned models are trained on, and how.

    instructions: a hub id (or a folder laid out like one) of rows with instruction, input and output, at `revision`;
    None: the texts that are calibrated on, for their next tokens. length: tokens of a sample at most.
    """

    instructions: str | None = None
    revision: str | None = None
    length: int = Field(default=256, ge=2)
    recipe: Recipe = Recipe()
