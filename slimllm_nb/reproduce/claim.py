"""One claim of the paper, as a line of data/paper/claims.yaml or a number of a table (claims.py), and its tolerance."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, model_validator

from slimllm_nb.settings import Settings


class PaperError(ValueError):
    """A table that does not exist, an invalid claims.yaml, or a metric that is not a finite number."""


class Swept(BaseModel):
    """In `group` of data/ablations/plan.yaml, at `setting`, the perplexity of `method` is higher (`lower`: lower) than
    SlimLLM's in the group `against` (None: in the same).

    Over the seeds of the kept sweep, per seed the mean over all corpora (differences.kept_difference).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    group: str
    setting: str
    method: str
    against: str | None = None
    lower: bool = False


class Claim(BaseModel):
    """One claim of the paper and how it is measured: `left` is less than, more than or within a tolerance of `right`.
    Or, where it compares methods, a difference over seeds (`swept`): it holds when the interval lies on the claimed
    side, and is inconclusive when the interval contains 0.

    margin: relative to |right|. For less and more, what is closer than that is inconclusive; for within, it is
    the tolerance, unless `absolute` gives one in the metric's own unit.
    one_seed: the metrics come from one draw of calibration samples, which cannot show that a difference between methods
    is more than chance: the verdict says so, and whether the difference is the claimed one.
    right None: nothing was published to compare with.
    kind: what the paper publishes, an identity that holds by construction, or a check of our own.
    cell: of the paper's tables that it is about: file, row, column.
    profiles: those it applies to (None: all); expected: those whose run fails when it does not hold.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    notebook: str
    kind: Literal["published", "identity", "check"] = "published"
    claim: str
    source: str
    paper: str
    left: str | None = None
    right: str | float | None = None
    relation: Literal["less", "more", "within"] | None = None
    swept: Swept | None = None
    margin: float | None = Field(default=None, ge=0)
    absolute: float | None = Field(default=None, ge=0)
    one_seed: bool = False
    cell: tuple[str, int, str] | None = None
    profiles: list[str] | None = None
    expected: list[str] = []

    @model_validator(mode="after")
    def _one_tolerance(self):
        measured = (self.left, self.relation, self.margin, self.absolute)
        if self.swept is not None:
            if any(one is not None for one in (*measured, self.right)):
                raise ValueError("give either swept, or left, right, relation and a tolerance")
            return self
        if self.left is None or self.relation is None:
            raise ValueError("give left, right and relation, or swept")
        if (self.margin is None) == (self.absolute is None):
            raise ValueError("give either margin (relative) or absolute")
        if self.profiles is not None and not set(self.expected) <= set(self.profiles):
            raise ValueError("expected names a profile that profiles does not")
        return self

    @property
    def tolerance(self) -> str:
        """As it is printed: the same on every machine."""
        if self.swept is not None:
            return "95 % interval"
        if self.right is None:
            return "-"
        size = f"{self.absolute:g}" if self.margin is None else f"{100 * self.margin:g} %"
        if not self.margin and not self.absolute:
            return "exact" if self.relation == "within" else self.relation
        return f"± {size}" if self.relation == "within" else f"{self.relation} by {size}"


class Claims(RootModel):
    root: list[Claim]

    @model_validator(mode="after")
    def _unique(self):
        ids = [claim.id for claim in self.root]
        if twice := sorted({name for name in ids if ids.count(name) > 1}):
            raise ValueError(f"these ids occur twice: {', '.join(twice)}")
        return self


class Tolerance(Settings):
    """Relative (margin) or in the metric's own unit (absolute), and why."""

    margin: float | None = None
    absolute: float | None = None
    why: str


class Tolerances(RootModel):
    root: dict[str, Tolerance]
