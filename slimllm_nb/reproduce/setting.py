"""What a profile (profiles.py) is made of: samples, texts, questions, amounts of pruning, published rows."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from slimllm_nb.settings import Settings


class Calibration(Settings):
    """The samples that importance is measured on: `num_samples` windows of `length` tokens (paper section 5.1)."""

    corpus: str
    num_samples: int = Field(ge=1)
    length: int = Field(ge=2)


class Evaluation(Settings):
    """Perplexity over blocks of `block_length` tokens, `max_tokens` of each corpus at most (null: all)."""

    corpora: Annotated[list[str], Field(min_length=1)]
    block_length: int = Field(ge=2)
    max_tokens: int | None = Field(default=None, ge=2)


class ZeroShot(Settings):
    """Zero-shot tasks of lm-evaluation-harness; limit: the first so many questions of each (null: all).

    add_bos_token: whether a beginning-of-sequence token stands in front of every question (null: as the tokenizer does
    by itself). A profile without them takes the local tasks, measured by `make zeroshot` and kept in data/zeroshot.
    """

    tasks: Annotated[list[str], Field(min_length=1)]
    limit: int | None = Field(default=None, ge=1)
    add_bos_token: bool | None = None


class Setting(Settings):
    """One amount of pruning and the folder in the run folder that keeps the pruned model.

    Either pruning_ratio (see ratios.allocate) or target_parameters (the share of the parameters of `target_of` that is
    to be left; see prune). method: another than the profile's.
    """

    pruning_ratio: float | None = Field(default=None, ge=0, lt=1)
    target_parameters: float | None = Field(default=None, gt=0, le=1)
    target_of: Literal["model", "decoder"] = "model"
    pruned_layers: int = Field(ge=0)
    alpha: float = Field(allow_inf_nan=False)
    channel_multiple: int = Field(default=1, ge=1)
    checkpoint: str = Field(pattern=r"^[\w-]+$")
    method: str | dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_amount(self):
        if (self.pruning_ratio is None) == (self.target_parameters is None):
            raise ValueError("give either pruning_ratio or target_parameters")
        return self

    @property
    def arguments(self) -> dict:
        """The keyword arguments of prune()."""
        return self.amount if self.method is None else {**self.amount, "method": self.method}

    @property
    def amount(self) -> dict:
        """Those of them that say how much goes, whatever the method."""
        if self.target_parameters is None:
            return {"pruning_ratio": self.pruning_ratio, **self.spread}
        return {"target_parameters": self.target_parameters, "target_of": self.target_of, **self.spread}

    @property
    def spread(self) -> dict:
        """And of these, those that say how it is spread over layers and channels."""
        multiple = {} if self.channel_multiple == 1 else {"channel_multiple": self.channel_multiple}
        return {"pruned_layers": self.pruned_layers, "alpha": self.alpha, **multiple}

    def mean_ratio(self, layers: int) -> float:
        """The mean ratio over the pruned layers; for a target, about what it takes (prune() plans it exactly)."""
        if self.pruning_ratio is not None:
            return self.pruning_ratio
        return min(0.9, (1 - self.target_parameters) * layers / max(self.pruned_layers, 1))


class Latency(Settings):
    """The paper's Table 3: seconds to the first token after a prompt, at batch 1, and of generating `new_tokens` at
    `batch`. Medians of `repeats` here, the means of 20 runs there."""

    table: str = "table3_latency"
    prompt_length: int = Field(default=256, ge=1)
    new_tokens: int = Field(default=256, ge=2)
    batch: int = Field(default=8, ge=1)
    repeats: int = Field(default=3, ge=1)


class Published(Settings):
    """The paper's rows for this model: a table of data/paper (or the path of a CSV file with the same columns).

    dense, method: the names of the rows. parameters_removed: by setting, the share of the model's parameters. latency:
    where its speed is published, too.
    """

    table: str
    source: str
    dense: str
    method: str = "SlimLLM"
    parameters_removed: dict[str, float] = Field(default_factory=dict)
    latency: Latency | None = None
