"""The blocks of commands in README and quickstart, as they are written there."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "docs/index.md")
_BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<kind>console|python)\n(?P<text>.*?)^ *```$", re.M | re.S
)


class Block(NamedTuple):
    """A block of a document: commands as a shell takes them, or a program."""

    document: str
    kind: str  # console, python
    text: str


def blocks() -> list[Block]:
    """Return all blocks of the documents, in their order."""
    found = []
    for document in DOCUMENTS:
        for block in _BLOCK.finditer((ROOT / document).read_text()):
            lines = [line[len(block["indent"]) :] for line in block["text"].splitlines()]
            if block["kind"] == "console":
                lines = [line.removeprefix("$ ") for line in lines]
            found.append(Block(document, block["kind"], "\n".join(lines)))
    return found


def commands() -> set[str]:
    """Return each command of the documents once; one that goes on in the next line is one."""
    joined = (block.text for block in blocks() if block.kind == "console")
    return {
        command.strip()
        for text in joined
        for command in re.split(r"\n(?=\S)", text)
        if command.strip()
    }
