"""A run's settings: which model, which texts, how much is pruned. Read from data/profiles/*.yaml and validated."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from slimllm_nb.corpora import EMBEDDED_CORPORA, NEVER_CALIBRATED, CorpusError, TextSource, find_corpus
from slimllm_nb.files import ROOT
from slimllm_nb.recipe import Tuning
from slimllm_nb.reproduce.setting import Calibration, Evaluation, Published, Setting, ZeroShot
from slimllm_nb.settings import Settings, read_validated

PROFILES = ROOT / "data" / "profiles"
DEVICE = "SLIMLLM_NB_DEVICE"  # a device in the place of the profile's


class ProfileError(ValueError):
    """A profile that does not exist, or a file that is not a valid one."""


class Profile(Settings):
    """What one run of the notebooks works with. `settings` is keyed by the percentage removed: "20", "50".

    model: "embedded", a folder, or a hub id at `revision`. device: "auto" (a GPU where there is one), "cpu", "cuda",
    "cuda:1". dtype: of the weights ("auto": the checkpoint's own). split_special_tokens: see sources.load_tokenizer.
    texts: corpora of your own by name. method: a name or a mapping of parts (methods.as_method), for all settings that
    name no other; parts: Python files of your own that register some, run when the profile is loaded.
    tuning: how pruned models are trained (`make tune`); tune: whether a run does so (notebook 09).
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    description: str
    model: str
    revision: str | None = None
    split_special_tokens: bool = False
    device: str = Field(default="cpu", pattern=r"^(auto|cpu|cuda(:\d+)?|mps|xpu(:\d+)?)$")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "float32"
    seed: int = Field(ge=0)
    texts: dict[str, TextSource] = Field(default_factory=dict)
    method: str | dict[str, Any] | None = None
    parts: list[str] = Field(default_factory=list)
    calibration: Calibration
    evaluation: Evaluation
    zeroshot: ZeroShot | None = None
    settings: dict[Annotated[str, Field(pattern=r"^\d+(\.\d+)?$")], Setting] = Field(min_length=1)
    published: Published | None = None
    tuning: Tuning | None = None
    tune: bool = False

    @model_validator(mode="before")
    @classmethod
    def _method_of_every_setting(cls, values):
        if isinstance(values, dict) and values.get("method") is not None and isinstance(values.get("settings"), dict):
            shared = {"method": values["method"]}
            settings = {key: shared | one if isinstance(one, dict) else one for key, one in values["settings"].items()}
            values = values | {"settings": settings}
        return values

    @model_validator(mode="after")
    def _corpora_apart(self):
        for corpus in {self.calibration.corpus, *self.evaluation.corpora}:
            try:
                find_corpus(corpus, self.texts)
            except CorpusError as error:
                raise ValueError(str(error)) from error
        if self.calibration.corpus in set(NEVER_CALIBRATED) - set(self.texts):
            raise ValueError(f"{self.calibration.corpus} is for judging alone: name another corpus to calibrate on")
        both = {self.calibration.corpus} & set(self.evaluation.corpora) - (set(EMBEDDED_CORPORA) - set(self.texts))
        if both:
            raise ValueError(
                f"{', '.join(both)} is calibrated on and evaluated on: name two corpora (the embedded ones are split "
                "into halves by document)"
            )
        if self.tune and self.tuning is None:
            raise ValueError("tune is true, but tuning does not say how")
        checkpoints = [setting.checkpoint for setting in self.settings.values()]
        if len(set(checkpoints)) < len(checkpoints):
            raise ValueError(f"each setting needs a checkpoint folder of its own; found {', '.join(checkpoints)}")
        return self

    @property
    def method_name(self) -> str:
        """What tables call the method."""
        if self.method in (None, "slimllm"):
            return "SlimLLM"
        return self.method if isinstance(self.method, str) else self.method.get("name", "own method")

    @property
    def loading(self) -> dict:
        """The keyword arguments of sources.load_model."""
        return {"revision": self.revision, "dtype": self.dtype, "device": self.device}

    @property
    def tokenizing(self) -> dict:
        """The keyword arguments of sources.load_tokenizer."""
        return {"revision": self.revision, "split_special_tokens": self.split_special_tokens}

    @property
    def mildest(self) -> str:
        """The key of the setting that removes least: "20"."""
        return min(self.settings, key=float)

    @property
    def strongest(self) -> str:
        """The key of the setting that removes most: "50". The same as `mildest` where there is one setting."""
        return max(self.settings, key=float)


def load_profile(name: str) -> Profile:
    """The profile data/profiles/<name>.yaml, or the one in a file of your own, when `name` is a path to a .yaml file.

    Paths in a file of your own (model, texts, published table) are relative to it.
    Raises: ProfileError for an unknown name (lists the allowed ones), a file that is not there, and an invalid file
    (names the file, each setting, what was found and what is allowed).
    """
    if not PROFILES.is_dir() and not is_path(name):
        raise ProfileError(
            f"profile {name!r}: the named profiles lie in data/ of the repository, which an installed package lacks; "
            "give the path of a .yaml file of your own, or work in a clone"
        )
    allowed = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    path = Path(name) if is_path(name) else PROFILES / f"{name}.yaml"
    if not path.is_file():
        wrong = f"no file {path}" if is_path(name) else f"unknown profile {name!r}"
        raise ProfileError(f"{wrong}; allowed: {', '.join(allowed)}, or the path of a .yaml file of your own")
    profile = read_validated(path, Profile, ProfileError)
    if profile.name != path.stem:
        raise ProfileError(f"{path}: name is {profile.name!r}; it must be {path.stem!r}, as the file is called")
    profile = _with_paths(profile, path.resolve().parent)
    if device := os.environ.get(DEVICE):
        profile = _on_device(profile, device)
    own = [one.method for one in profile.settings.values() if one.method is not None]
    if own or profile.parts:
        from slimllm_nb.methods import as_method, load_file  # imports torch, which others need not wait for

        try:
            for file in profile.parts:
                load_file(Path(file))
            for method in own:
                as_method(method)  # looks every part up
        except ValueError as error:
            raise ProfileError(f"profile {profile.name}: {error}") from error
    return profile


def own_files(profile: Profile) -> list[Path]:
    """What a run depends on beside the profile itself: the files of its own texts, parts, published table and model."""
    names = [file for source in profile.texts.values() for file in source.files or ()]
    names += [*profile.parts, profile.model, *([profile.published.table] if profile.published else [])]
    return [path for path in map(Path, names) if path.exists()]


def _on_device(profile: Profile, device: str) -> Profile:
    try:
        return Profile.model_validate(profile.model_dump() | {"device": device})
    except ValueError as error:
        raise ProfileError(f"{DEVICE} is {device!r}; allowed: auto, cpu, cuda, cuda:1 and their like") from error


def _with_paths(profile: Profile, folder: Path) -> Profile:
    """Relative paths made absolute: the notebooks run elsewhere. What is no folder there is a hub id."""

    def placed(name: str) -> str:
        return str(folder / name) if (folder / name).is_dir() else name

    texts = {}
    for name, one in profile.texts.items():
        own = {"files": [str(folder / file) for file in one.files]} if one.files else {"dataset": placed(one.dataset)}
        texts[name] = one.model_copy(update=own)
    changes = {"model": placed(profile.model), "texts": texts, "parts": [str(folder / one) for one in profile.parts]}
    if profile.published and profile.published.table.endswith(".csv"):
        table = str(folder / profile.published.table)
        changes["published"] = profile.published.model_copy(update={"table": table})
    return profile.model_copy(update=changes)


def is_path(name: str) -> bool:
    """Whether a profile is given by the path of a file, not by the name of one in data/profiles."""
    return name.endswith(".yaml")


def run_folder(profile_name: str) -> Path:
    """Where a run of this profile leaves what came out: $SLIMLLM_NB_RUNS, or runs/ in the repository, / profile."""
    return Path(os.environ.get("SLIMLLM_NB_RUNS") or ROOT / "runs").resolve() / profile_name
