"""Imports run benchmarks -> serving -> router, in strings too, and never in a circle."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import router

ROOT = Path(__file__).parents[1]
# Each may import itself and those before it.
LAYERS = ("router", "serving", "benchmarks", "tests")
_PATH = re.compile(rf"(?<![\w.])(?:{'|'.join(LAYERS)})(?:\.\w+)+")


def read_modules(root: Path) -> dict[str, str]:
    """Return the source of every module in the layers, by name."""
    found = {}
    for layer in LAYERS:
        for path in sorted((root / layer).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path.read_text()
    return found


def find_imports(tree: ast.Module) -> Iterator[str]:
    """Yield the full name of everything that is imported, wherever in the file it is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import: the name of the module says more"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def find_strings(tree: ast.Module) -> Iterator[str]:
    """Yield every module path in a string that is no docstring: "a.b" of "a.b:C" too."""
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield from _PATH.findall(node.value)


def module_of(name: str, modules: dict[str, str]) -> str | None:
    """Return the module that this is or is in; None if there is none.

    What stands in no layer is somebody else's; a path that leads to no module below its
    layer is an old name, by which nothing can be imported.
    """
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    return name if name in modules else None


def against_direction(modules: dict[str, str]) -> list[str]:
    """Return what imports, or names in a string, a module of a later layer."""
    found = []
    for importer, source in modules.items():
        tree = ast.parse(source)
        own = LAYERS.index(importer.partition(".")[0])
        imported = [module_of(name, modules) for name in find_imports(tree)]
        named = [module_of(path, modules) for path in find_strings(tree)]
        # A layer alone is a word, or what is left of an old name.
        named = [name for name in named if name not in LAYERS]
        for name in (*imported, *named):
            if name is not None and LAYERS.index(name.partition(".")[0]) > own:
                found.append(f"{importer} -> {name}")
    return found


def find_circle(modules: dict[str, str]) -> list[str]:
    """Return modules that import one another, the first again at the end; [] if none do."""
    graph: dict[str, set[str]] = {}
    for importer, source in modules.items():
        imported = (module_of(name, modules) for name in find_imports(ast.parse(source)))
        graph[importer] = {name for name in imported if name is not None} - {importer}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_run_in_one_direction():
    assert against_direction(read_modules(ROOT)) == []


def test_there_is_no_circle():
    assert find_circle(read_modules(ROOT)) == []


def test_shells_take_the_public_face_from_router():
    """What `router` hands on is not taken from the modules below it."""
    shells = {
        name: source
        for name, source in read_modules(ROOT).items()
        if name.startswith(("serving", "benchmarks", "router.simulation"))
    }
    around = [
        f"{name}: {imported}"
        for name, source in shells.items()
        for imported in find_imports(ast.parse(source))
        if imported.startswith("router.") and imported.count(".") > 1
        if imported.rpartition(".")[2] in router.__all__
    ]
    assert around == []


def layers_with(name: str, source: str) -> dict[str, str]:
    """A small house with one module replaced or added."""
    modules = dict.fromkeys(LAYERS, "")
    modules |= {"router.a": "", "serving.b": "from router.a import x", "benchmarks.c": ""}
    return modules | {name: source}


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("router.a", "import serving"),
        ("router.a", "import serving.b as b"),
        ("router.a", "from serving import b"),
        ("router.a", "def f():\n    from benchmarks.c import x"),
        ("router.a", "if TYPE_CHECKING:\n    from serving.b import x"),
        ("router.a", "f = 'serving.b:x'"),
        ("serving.b", "from benchmarks.c import x"),
        ("serving.b", "import_module('benchmarks.c')"),
        ("serving.b", "command = ['-m', f'benchmarks.c:{name}']"),
        ("serving.b", "def f(x: 'benchmarks.c.X'): ..."),
        ("serving.b", "'''Prose.'''\n'benchmarks.c'"),
        ("benchmarks.c", "from tests import x"),
    ],
)
def test_wrong_directions_are_found(importer, source):
    assert against_direction(layers_with(importer, source))


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("serving.b", "import router.a, asyncio, routers.b"),
        ("serving.b", '"""As `benchmarks.c` does."""'),
        ("serving.b", 'def f():\n    """As `benchmarks.c`."""\n    return "serving.b:f"'),
        ("serving.b", "RENAMED = {'benchmarks.old:X': 'serving.b:X'}"),
        ("benchmarks.c", "from serving.b import x\nn = 'router.a'"),
    ],
)
def test_right_directions_are_not(importer, source):
    assert against_direction(layers_with(importer, source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import serving.b",
        "from serving import b",
        "def f():\n    from serving.b import x",
        "if TYPE_CHECKING:\n    from serving.b import x",
    ],
)
def test_circles_are_found(source):
    assert set(find_circle(layers_with("router.a", source))) == {"router.a", "serving.b"}


def test_a_package_is_no_circle_with_what_it_hands_on():
    modules = layers_with("serving", "from serving.b import x")
    assert find_circle(modules) == []
    assert find_circle(modules | {"serving.b": "from serving import x"})
