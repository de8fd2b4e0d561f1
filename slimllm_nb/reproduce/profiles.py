"""A run's settings: which model, which texts, how much is pruned. Read from data/profiles/*.yaml and validated."""

import os
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slimllm_nb.files import ROOT

PROFILES = ROOT / "data" / "profiles"

Corpus = Literal["news", "wikipedia"]
Model = TypeVar("Model", bound=BaseModel)


class ProfileError(ValueError):
    """A profile that does not exist, or a file that is not a valid one."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(_Settings):
    """The samples that importance is measured on: `num_samples` windows of `length` tokens (paper section 5.1)."""

    corpus: Corpus
    num_samples: int = Field(ge=1)
    length: int = Field(ge=2)


class Evaluation(_Settings):
    """Perplexity over blocks of `block_length` tokens, `max_tokens` of each corpus's held-out half at most."""

    corpora: Annotated[list[Corpus], Field(min_length=1)]
    block_length: int = Field(ge=2)
    max_tokens: int = Field(ge=2)


class Setting(_Settings):
    """One amount of pruning (see ratios.allocate) and the folder in the run folder that keeps the pruned model."""

    pruning_ratio: float = Field(ge=0, lt=1)
    pruned_layers: int = Field(ge=0)
    alpha: float = Field(allow_inf_nan=False)
    checkpoint: str = Field(pattern=r"^[\w-]+$")


class Profile(_Settings):
    """What one run of the notebooks works with. `settings` is keyed by the percentage removed: "20", "50"."""

    name: str
    description: str
    model: str
    seed: int = Field(ge=0)
    calibration: Calibration
    evaluation: Evaluation
    settings: dict[str, Setting] = Field(min_length=1)


def load_profile(name: str) -> Profile:
    """The profile data/profiles/<name>.yaml, or the one in a file of your own, when `name` is a path to a .yaml file.

    Errors: ProfileError for an unknown name (lists the allowed ones), a file that is not there, and an invalid file
    (names the file, each setting, what was found and what is allowed).
    """
    allowed = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    path = Path(name) if is_path(name) else PROFILES / f"{name}.yaml"
    if not path.is_file():
        wrong = f"no file {path}" if is_path(name) else f"unknown profile {name!r}"
        raise ProfileError(f"{wrong}; allowed: {', '.join(allowed)}, or the path of a .yaml file of your own")
    profile = read_validated(path, Profile, ProfileError)
    if profile.name != path.stem:
        raise ProfileError(f"{path}: name is {profile.name!r}; it must be {path.stem!r}, as the file is called")
    return profile


def is_path(name: str) -> bool:
    """Whether a profile is given by the path of a file, not by the name of one in data/profiles."""
    return name.endswith(".yaml")


def run_folder(profile_name: str) -> Path:
    """Where a run of this profile leaves what came out: $SLIMLLM_NB_RUNS, or runs/ in the repository, / profile."""
    return Path(os.environ.get("SLIMLLM_NB_RUNS") or ROOT / "runs").resolve() / profile_name


def read_validated(path: Path, model: type[Model], error: type[Exception]) -> Model:
    """A YAML file as `model`; raises `error` with the file, and per wrong setting what was found and is allowed."""
    try:
        return model.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as problem:
        raise error(f"{path} is not valid YAML: {problem}") from problem
    except ValidationError as problem:
        lines = [
            f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']} (found {one['input']!r})"
            for one in problem.errors()
        ]
        raise error(f"{path} is not valid:\n  " + "\n  ".join(lines)) from problem
