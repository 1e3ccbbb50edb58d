"""What do the steps of known engines cost? Profiles, measured or published, one file each.

Files are read and written here. Called by all that emulates or simulates engines, and by
`headway profile`, which measures new ones.
"""

from pathlib import Path

import yaml
from pydantic import ValidationError

from router.simulation.engine.profile import Profile

FOLDER = Path(__file__).parent
DEFAULT_PROFILE = "h100-llama8b"  # of emulated engines


class ProfileError(ValueError):
    """A profile cannot be read or is not valid; the message names the key to change."""


def load_profile(name: str | Path) -> Profile:
    """Return the profile in a file, or the one of this package with this name.

    The beginning of a name is enough where it is unique: `h100`. Raises `ProfileError`.
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
    except (ValidationError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ProfileError(f"profile {path}: {error}") from None


def save_profile(profile: Profile, path: Path) -> None:
    """Write the file that `load_profile` reads."""
    path.write_text(yaml.safe_dump(profile.model_dump(), sort_keys=False, allow_unicode=True))
