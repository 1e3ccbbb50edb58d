"""The git checkout that this code runs from, if it does: which commit results come from."""

import subprocess
from pathlib import Path

_ROOT = Path(__file__).parents[1]


def commit_id() -> str | None:
    """Return the commit that is checked out; `None` outside of a checkout."""
    return git("rev-parse", "--verify", "--quiet", "HEAD") or None


def git(*arguments: str) -> str | None:
    """Return what git says of the checkout; `None` if it fails."""
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
