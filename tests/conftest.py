"""In which order do tests run, and how many examples do generated ones go through?

A hundred each, or what they say, new ones in every run. `make test
ARGS=--hypothesis-profile=long` goes through 2,500, for changes to the router.

The core runs as plain Python unless `HEADWAY_CORE` says otherwise; `test_compiled_core.py` does,
in a process beside this one, which starts first and is asked later.
"""

import os
from shutil import which

os.environ.setdefault("HEADWAY_CORE", "plain")  # for processes that tests start, too

# Hypothesis loads modules late, deep in pytest's own frames: where a test has
# failed, Python 3.11's parser then breaks off the whole report.
import hypothesis.internal.observability  # noqa: F401
import pytest
from hypothesis import settings

import serving  # noqa: F401  before any test imports `router`
from tests.deploy.compiled_core import compiled_run

settings.register_profile("long", max_examples=2500)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the core's tests first and real engines last."""
    items.sort(key=_cost)  # stable: within a kind the order stays


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the core's tests in its compiled form beside all others, if they are to run."""
    runs = any(item.name == "test_the_tests_of_the_core" for item in session.items)
    if runs and which("cc") and not session.config.option.collectonly:
        session.config.add_cleanup(compiled_run().stop)


def _cost(item: pytest.Item) -> int:
    if item.get_closest_marker("engine"):
        return 2
    return 0 if "router" in item.path.parts else 1
