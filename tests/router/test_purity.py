"""The core, its simulation included, depends on nothing but its arguments."""

import ast
from pathlib import Path

import pytest

import router

FORBIDDEN = {"asyncio", "datetime", "io", "os", "pathlib", "ray", "socket", "subprocess"}
FORBIDDEN |= {"threading", "time", "vllm"}
SEEDED = {"Generator", "default_rng"}  # of numpy.random
FILE_ACCESS = {"open", "read_bytes", "read_text", "write_bytes", "write_text"}
FOLDER = Path(router.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))


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
        elif isinstance(node, ast.Attribute):
            match node.value:
                case ast.Name("random") if node.attr != "Random":
                    found.append(f"random.{node.attr}")
                case ast.Attribute(_, "random") if node.attr not in SEEDED:
                    found.append(f"np.random.{node.attr}")
            continue
        elif isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if name in FILE_ACCESS:
                found.append(f"{name}()")
            continue
        else:
            continue
        found += [name for name in names if name.split(".")[0] in FORBIDDEN]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
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
        "import numpy as np\nnp.random.normal()",
        "with open('a.yaml') as file: ...",
        "text = Path('a.yaml').read_text()",
        "path.write_text('')",
        "with (folder / 'a.yaml').open() as file: ...",
    ],
)
def test_breaches_are_found(source):
    assert breaches(source)


@pytest.mark.parametrize(
    "source",
    [
        "import random\nrng = random.Random(0)\nrng.random()",
        "import numpy as np\nrng = np.random.default_rng(0)\nrng.normal()",
    ],
)
def test_a_generator_of_ones_own_is_no_breach(source):
    assert breaches(source) == []
