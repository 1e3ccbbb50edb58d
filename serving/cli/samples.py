"""Where are the samples of `deploy/`? In a checkout there, in an installation beside this code."""

from pathlib import Path

from serving.config import ConfigError

_PACKAGE = Path(__file__).parents[1]
FOLDER = _PACKAGE / "samples"  # `deploy/wheel.py` puts them there
if not FOLDER.is_dir():
    FOLDER = _PACKAGE.parent / "deploy"


def sample_names() -> list[str]:
    """Return the config files among them."""
    return sorted(path.name for path in FOLDER.glob("*.yaml"))


def sample_path(name: str) -> Path:
    """Return the path of a sample, with or without `.yaml`. Raise `ConfigError` if none is."""
    path = FOLDER / (name if name.endswith(".yaml") else f"{name}.yaml")
    if path.name not in sample_names():
        raise ConfigError(f"{name}: no such sample; there are {', '.join(sample_names())}")
    return path


def sample_title(name: str) -> str:
    """Return the first sentence of a sample, which says what it is."""
    first = (FOLDER / name).read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()
