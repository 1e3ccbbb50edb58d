"""`make compile` on a small checkout: what is made, from what, and who runs with it."""

import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import copy

import pytest

from tests.deploy.compiled_core import ROOT, needs_compiler

COMPILING = "headway: compiling the core, which takes a minute or two\n"
FALLBACK = "the core runs as plain Python, decisions take two to nine times as long\n"

ROUTER = '''
"""A core of one module."""

from enum import Enum
from functools import cached_property

import msgspec

_ONE = 1


class Form(Enum):
    """Kept."""

    ROUND = "round"


class Ring(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Kept, too."""

    size: int | None = _ONE
    form: Form = Form.ROUND


class Slow:
    @cached_property
    def answer(self) -> int:
        return 42


def line() -> int:
    raise ValueError("line 31")
'''
LOOK = """
import pickle, sys, serving, msgspec
from router.core import router
from serving.core_form import form
Ring = router.Ring
assert pickle.loads(pickle.dumps(Ring(size=2))) == Ring(size=2)
print(form(), Ring.__struct_config__.frozen, msgspec.json.encode(Ring()).decode(),
      msgspec.inspect.type_info(Ring).fields[0].type, Ring.__doc__, Ring.__module__,
      router.Form.__doc__, router.Slow().answer, sep="|")
"""
SEEN = (
    'True|[1,"round"]|UnionType(types=(IntType(gt=None, ge=None, lt=None, le=None, '
    "multiple_of=None), NoneType()))|Kept, too.|router.core.router|Kept.|42\n"
)


class Checkout:
    """A checkout with a small core, and commands in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.router = root / "router" / "core" / "router.py"
        self.folder = root / ".venv" / "headway-core"
        self.router.parent.mkdir(parents=True)
        self.router.write_text(ROUTER.lstrip())
        for package in ("router", "router/core", "serving", "deploy"):
            (root / package).mkdir(exist_ok=True)
        (root / "router" / "__init__.py").touch()
        (root / "router" / "core" / "__init__.py").touch()
        copy(ROOT / "serving" / "__init__.py", root / "serving")
        copy(ROOT / "serving" / "core_form.py", root / "serving")
        copy(ROOT / "deploy" / "compile.py", root / "deploy")

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        env = {name: value for name, value in os.environ.items() if name != "HEADWAY_CORE"}
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.root,
            env=env | {"PYTHONPATH": str(self.root)} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        with self.start(*arguments, **variables) as started:
            stdout, stderr = started.communicate()
        return subprocess.CompletedProcess(arguments, started.returncode, stdout, stderr)

    def compile(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run("deploy/compile.py", *arguments, **variables)

    def look(self, **variables: str) -> str:
        """Return the form that runs, and what the core is like."""
        seen = self.run("-c", LOOK, **variables)
        return seen.stdout if seen.returncode == 0 else seen.stderr

    def made(self) -> list[str]:
        """Return what is in the folder of compiled forms, but for the lock and the note."""
        if not self.folder.exists():
            return []
        beside = ("lock", "as-seen")
        return sorted(path.name for path in self.folder.iterdir() if path.name not in beside)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "checkout")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """Return one that is compiled, for tests that put everything back."""
    checkout = Checkout(tmp_path_factory.mktemp("compiled") / "checkout")
    done = checkout.compile()
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr == COMPILING
    assert len(checkout.made()) == 1
    yield checkout
    assert len(checkout.made()) == 1


@needs_compiler
class TestCompiled:
    def test_runs_by_itself_unless_told_otherwise(self, compiled: Checkout) -> None:
        assert compiled.look() == f"compiled|{SEEN}"
        assert compiled.look(HEADWAY_CORE="compiled") == f"compiled|{SEEN}"
        assert compiled.look(HEADWAY_CORE="plain") == f"plain|{SEEN}"

    def test_is_made_once(self, compiled: Checkout) -> None:
        done = compiled.compile(CC="/bin/false")
        assert (done.returncode, done.stderr) == (0, "")

    def test_nothing_is_beside_the_sources(self, compiled: Checkout) -> None:
        beside = [path for path in compiled.root.rglob("*.so") if ".venv" not in path.parts]
        assert beside == []
        assert compiled.router.read_text() == ROUTER.lstrip()

    def test_lines_keep_their_numbers(self, compiled: Checkout) -> None:
        raised = compiled.run("-c", "import serving; import router.core.router as r; r.line()")
        number = ROUTER.lstrip().splitlines().index('    raise ValueError("line 31")') + 1
        assert f'router.py", line {number}, in line' in raised.stderr

    @pytest.mark.parametrize("name", ["router/core/router.py", "deploy/compile.py"])
    def test_what_was_made_of_other_sources_is_not_taken(
        self, compiled: Checkout, name: str
    ) -> None:
        path = compiled.root / name
        before = path.read_text()
        path.write_text(before + "# changed\n")
        try:
            assert compiled.look() == f"plain|{SEEN}"
            assert "no compiled core of these sources" in compiled.look(HEADWAY_CORE="compiled")
        finally:
            path.write_text(before)
        assert compiled.look() == f"compiled|{SEEN}"

    def test_a_new_module_makes_other_sources(self, compiled: Checkout) -> None:
        added = compiled.root / "router" / "added.py"
        added.touch()
        try:
            assert compiled.look() == f"plain|{SEEN}"
        finally:
            added.unlink()

    def test_too_late_is_said(self, compiled: Checkout) -> None:
        code = "import router.core.router\nimport serving"
        late = compiled.run("-c", code, HEADWAY_CORE="compiled")
        assert "router was imported before serving, in its plain form" in late.stderr
        assert compiled.run("-c", code).returncode == 0


NOTE = """
import sys
import serving
from serving import core_form
print("hashlib" in sys.modules, core_form._folder_as_noted() == core_form.compiled_folder())
"""


def test_what_was_found_is_noted_until_something_changes(checkout: Checkout) -> None:
    """Reading all sources takes each process 60 ms, looking at them less than one."""
    checkout.folder.mkdir(parents=True)
    assert checkout.run("-c", NOTE).stdout == "True False\n"  # too young to be noted
    time.sleep(2.1)
    assert checkout.run("-c", NOTE).stdout == "True True\n"
    assert checkout.run("-c", NOTE).stdout == "False True\n"
    stat = checkout.router.stat()
    checkout.router.write_text(ROUTER.lstrip().replace("42", "43"))  # as large as before
    os.utime(checkout.router, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert checkout.run("-c", NOTE).stdout == "True False\n"


def test_an_installed_core_is_insisted_on(checkout: Checkout) -> None:
    """There is no other form to choose: what is not there is said, not passed over."""
    (checkout.root / "deploy" / "compile.py").unlink()
    assert checkout.look() == f"plain|{SEEN}"
    assert checkout.look(HEADWAY_CORE="plain") == f"plain|{SEEN}"
    assert "was installed plain: install a wheel" in checkout.look(HEADWAY_CORE="compiled")
    extension = checkout.router.with_suffix(sysconfig.get_config_var("EXT_SUFFIX"))
    extension.touch()
    assert "was installed compiled: " in checkout.look(HEADWAY_CORE="plain")
    again = checkout.run("-c", "import serving", HEADWAY_CORE="compiled")
    assert (again.returncode, again.stderr) == (0, "")


@needs_compiler
@pytest.mark.timeout(300)
def test_two_at_once_and_one_that_was_killed(checkout: Checkout) -> None:
    """Nobody sees a half, one of the two compiles, and what the killed one left goes."""
    with checkout.start("deploy/compile.py") as killed:
        while not list(checkout.folder.glob("build-*/core/c/*.c")):
            assert killed.poll() is None
            assert checkout.look() == f"plain|{SEEN}"
            time.sleep(0.1)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.communicate()
    assert [name.partition("-")[0] for name in checkout.made()] == ["build"]
    with checkout.start("deploy/compile.py") as one, checkout.start("deploy/compile.py") as other:
        said = [each.communicate()[1] for each in (one, other)]
    assert [one.returncode, other.returncode] == [0, 0]
    assert sorted(said) == ["", COMPILING]
    assert checkout.look() == f"compiled|{SEEN}"
    (folder,) = checkout.made()

    # The last few are kept, older ones go.
    for number in range(5):
        old = checkout.folder / f"old-{number}"
        old.mkdir()
        os.utime(old, (number, number))
    checkout.router.write_text(ROUTER.lstrip() + "# changed\n")
    assert checkout.compile().returncode == 0
    assert len(checkout.made()) == 3
    assert {folder, "old-4"} < set(checkout.made())


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"CC": "no-such-compiler"}, "no C compiler"),
        ({"CC": "/bin/false"}, "the C compiler /bin/false fails (exit status 1)"),
        ({"CC": "cc -nostdinc"}, "the C compiler cc fails ("),
    ],
)
def test_without_a_compiler_it_stays_plain(
    checkout: Checkout, variables: dict[str, str], why: str
) -> None:
    done = checkout.compile(**variables)
    assert done.returncode == 0
    assert done.stderr.startswith(f"headway: {why}")
    assert done.stderr.endswith(f": {FALLBACK}")
    assert done.stderr.count("\n") == 1
    assert checkout.made() == []
    assert checkout.look() == f"plain|{SEEN}"


@needs_compiler
def test_what_mypyc_refuses_stays_plain(checkout: Checkout) -> None:
    checkout.router.write_text(ROUTER.lstrip() + "\n\ndef wrong() -> int:\n    return ''\n")
    done = checkout.compile()
    assert done.returncode == 0
    assert "mypyc refuses it (router/core/router.py:" in done.stderr
    assert done.stderr.endswith(FALLBACK)
    assert done.stderr.count("\n") == 2
    assert checkout.made() == []
    assert checkout.look() == f"plain|{SEEN}"


@needs_compiler
def test_a_folder_that_cannot_be_written_stays_plain(checkout: Checkout) -> None:
    (checkout.root / ".venv").touch()
    done = checkout.compile()
    assert done.returncode == 0
    assert done.stderr.endswith(f" cannot be written (Not a directory): {FALLBACK}")


def test_only_three_forms_can_be_asked_for(checkout: Checkout) -> None:
    said = checkout.look(HEADWAY_CORE="fast")
    assert "HEADWAY_CORE is 'fast'; it can be auto, plain or compiled" in said
