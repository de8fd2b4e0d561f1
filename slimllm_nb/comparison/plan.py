"""The plan of the sweep (data/ablations/plan.yaml): groups of methods, each compared with SlimLLM by one protocol."""

from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, RootModel

from slimllm_nb.comparison.compare import Bench
from slimllm_nb.comparison.protocol import Protocol, named, protocol_of
from slimllm_nb.methods import Method, load_file
from slimllm_nb.reproduce.differences import KEPT
from slimllm_nb.reproduce.profiles import Profile, load_profile
from slimllm_nb.settings import Settings, read_validated

PLAN = KEPT / "plan.yaml"


def plan_of(profile: str) -> Path:
    """The profile's own plan (data/ablations/<profile>.plan.yaml: the paper's rows), or the one for all others."""
    own = KEPT / f"{profile}.plan.yaml"
    return own if own.is_file() else PLAN


class PlanError(ValueError):
    """A plan that is not valid."""


class Group(Settings):
    """Methods that are compared with SlimLLM under one protocol (see comparison.protocol_of). accuracy: on
    the profile's zero-shot tasks, too. parts: Python files beside the plan that register what its methods name.
    minutes: what measuring them took, for whoever asks for them again."""

    name: str
    question: str
    seeds: int = Field(ge=1)
    minutes: int | None = None
    num_samples: int | None = Field(default=None, ge=1)
    generated: int = Field(default=0, ge=0)
    calibrate_on: list[str] | None = None
    judge_on: list[str] | None = None
    accuracy: bool = False
    parts: list[str] = Field(default_factory=list)
    methods: list[str | dict[str, Any]]

    def protocol(self, profile: Profile) -> Protocol:
        return protocol_of(profile, self.calibrate_on, self.judge_on, self.num_samples, self.generated)

    def named_methods(self) -> dict[str, Method]:
        """SlimLLM and the group's own. Raises: PartError for an unknown one."""
        return named(self.methods)


class _Plan(RootModel):
    root: list[Group]


def load_plan(path: Path = PLAN) -> dict[str, Group]:
    """The groups by name. Raises: PlanError naming the file, and for an unknown method and a name that occurs twice."""
    groups = read_validated(path, _Plan, PlanError).root
    plan = {group.name: group for group in groups}
    if len(plan) < len(groups):
        raise PlanError(f"{path}: two groups have one name")
    for group in groups:
        try:
            for file in group.parts:
                load_file(path.parent / file)
            group.named_methods()
        except ValueError as error:
            raise PlanError(f"{path}: group {group.name}: {error}") from error
    return plan


@cache
def group_and_bench(profile: str, plan: Path, name: str) -> tuple[Group, Bench]:
    """A group and its bench; benches of one profile share the model."""
    group, loaded = load_plan(plan)[name], load_profile(profile)
    bench = Bench(loaded, group.protocol(loaded), progress=False, zeroshot=loaded.zeroshot if group.accuracy else None)
    bench.share_model(_first.setdefault(profile, bench))
    return group, bench


_first: dict[str, Bench] = {}
