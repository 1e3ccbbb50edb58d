"""Which parts of `headway` can be switched off, and what are they called?

`hold`, `order` and `length` are parts of the router, `prefix` and `congestion_cost` of the
policy. Switching one off shows what it is worth.
"""

from collections.abc import Collection
from typing import Literal, get_args

Part = Literal["hold", "order", "prefix", "congestion_cost", "length"]
PARTS: tuple[str, ...] = get_args(Part)

# Present names by old ones. Shells accept them until the next release, and warn.
RENAMED_PARTS = {"externality": "congestion_cost"}


def check_parts(parts: Collection[str]) -> None:
    """Raise `ValueError` for a part that does not exist."""
    if unknown := set(parts).difference(PARTS):
        raise ValueError(f"unknown part {min(unknown)!r} to ablate: one of {', '.join(PARTS)}")


def renamed_parts(parts: Collection[str]) -> dict[str, str]:
    """Return the old names among `parts`, each with the present one.

    Raises `ValueError` if a part is given by both.
    """
    renamed = {part: RENAMED_PARTS[part] for part in parts if part in RENAMED_PARTS}
    for old, new in renamed.items():
        if new in parts:
            raise ValueError(f"{old} is the old name of {new}: only one of them can be given")
    return renamed


def current_parts(parts: Collection[str]) -> tuple[str, ...]:
    """Return the parts by their present names, in the same order.

    Raises `ValueError` if a part is given by both its names; unknown ones stay as they are.
    """
    renamed = renamed_parts(parts)
    return tuple(renamed.get(part, part) for part in parts)
