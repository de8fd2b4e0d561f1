"""Settings that people write in YAML files, read and validated."""

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

Model = TypeVar("Model", bound=BaseModel)
UNKNOWN = "there is no such setting: remove it (CHANGELOG.md says what moved)"


class Settings(BaseModel):
    """A group of settings: an unknown name is refused, and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_validated(path: Path, model: type[Model], error: type[Exception]) -> Model:
    """A YAML file as `model`; raises `error` with the file, and per wrong setting what was found and is allowed."""
    try:
        return model.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path} cannot be read: {problem}") from problem
    except yaml.YAMLError as problem:
        raise error(f"{path} is not valid YAML: {problem}") from problem
    except ValidationError as problem:
        lines = []
        for one in problem.errors():
            said = UNKNOWN if one["type"] == "extra_forbidden" else one["msg"]
            lines.append(f"{'.'.join(map(str, one['loc']))}: {said} (found {one['input']!r})" if one["loc"] else said)
        raise error(f"{path} is not valid:\n  " + "\n  ".join(lines)) from problem
