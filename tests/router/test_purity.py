import ast
from pathlib import Path

import pytest

import router

FORBIDDEN = {"asyncio", "datetime", "ray", "socket", "threading", "time", "vllm"}
FILES = sorted(Path(router.__file__).parent.rglob("*.py"))


def breaches(source: str) -> list[str]:
    """What in the source would make a decision depend on more than its arguments."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "random":
                found.append("from random import")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "random" and node.attr != "Random":
                found.append(f"random.{node.attr}")
            continue
        else:
            continue
        found += [name for name in names if name.split(".")[0] in FORBIDDEN]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_core_is_pure(path):
    assert breaches(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import time",
        "import asyncio.queues as q",
        "from vllm.config import X",
        "def f():\n    import ray",
        "import random\nrandom.random()",
        "from random import choice",
    ],
)
def test_breaches_are_found(source):
    assert breaches(source)


def test_a_generator_of_ones_own_is_no_breach():
    assert breaches("import random\nrng = random.Random(0)\nrng.random()") == []
