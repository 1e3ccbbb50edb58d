"""What do all sections of the configuration have in common?"""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class ConfigError(ValueError):
    """A configuration that cannot work; the message names the key to change."""


class Section(BaseModel):
    """Keys of one kind; an unknown one is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _absolute(path: Path) -> Path:
    path = Path(os.path.expanduser(path))  # whose own way raises an error for an unknown user
    if not path.is_absolute():
        raise ValueError(
            "must be absolute here; `headway serve` takes it relative to the config file"
        )
    return path


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
