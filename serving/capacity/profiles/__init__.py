"""Profiles of engines: what their steps cost, measured or published, one file each.

Nothing is decided here: files are read and written. Called by all that emulates or simulates
engines, and by `headway profile`, which measures new ones.
"""

from pathlib import Path

import yaml
from pydantic import ValidationError

from router.simulation.engine.profile import Profile

FOLDER = Path(__file__).parent


class ProfileError(ValueError):
    """A profile that cannot be read or cannot work; the message names the key to change."""


def load_profile(name: str | Path) -> Profile:
    """Read a file, or a profile of this package by its name; raise `ProfileError`.

    The beginning of a name will do where only one has it: `h100`.
    """
    path = Path(name)
    if not path.suffix:
        path = FOLDER / f"{name}.yaml"
        if not path.exists() and len(alike := list(FOLDER.glob(f"{name}*.yaml"))) == 1:
            (path,) = alike
    try:
        return Profile.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise ProfileError(f"profile {name}: {error.strerror}; there are {known}") from None
    except (ValidationError, yaml.YAMLError) as error:
        raise ProfileError(f"profile {path}: {error}") from None


def save_profile(profile: Profile, path: Path) -> None:
    """Write the file that `load_profile` reads."""
    path.write_text(yaml.safe_dump(profile.model_dump(), sort_keys=False, allow_unicode=True))
