"""In which order do tests run, and how many examples do generated ones go through?

A hundred each, or what they say, new ones in every run. `make test
ARGS=--hypothesis-profile=long` goes through 2,500, for changes to the router.

The core runs as plain Python unless `HEADWAY_CORE` says otherwise; `test_compiled_core.py` does.
`make test` runs files in two processes at a time, so no test may depend on being alone.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Generator
from typing import Any

os.environ.setdefault("HEADWAY_CORE", "plain")  # for processes that tests start, too

# Hypothesis loads modules late, deep in pytest's own frames: where a test has
# failed, Python 3.11's parser then breaks off the whole report.
import hypothesis.internal.observability  # noqa: F401
import pytest
import uvloop
from hypothesis import settings

import serving  # noqa: F401  before any test imports `router`

settings.register_profile("long", max_examples=2500)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Say which tests have to share a process: whole services and real engines, and each file.

    Two services beside each other would have half of a core each, and want the same port.
    """
    if not item.config.pluginmanager.hasplugin("xdist"):
        return
    group = "services" if _is_large(item) else item.nodeid.partition("::")[0]
    item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the core's tests first and real engines last.

    In two processes one begins with the real engines, and the other takes a file at a time.
    """
    items.sort(key=_cost)  # stable: within a kind the order stays
    if _is_worker(config):
        items.sort(key=_is_large, reverse=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fail unless xdist, which has added a test's group to its name, keeps to the groups."""
    if _is_worker(session.config) and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("tests of a group run apart: pytest-xdist does not fit this pytest")


@pytest.fixture(autouse=True)
def _loggers_as_before() -> Generator[None]:
    """Undo what a command that ran in this process has set up for its own log."""
    ours = logging.getLogger("serving")
    handlers, propagate, level = ours.handlers[:], ours.propagate, ours.level
    yield
    ours.handlers[:], ours.propagate = handlers, propagate
    ours.setLevel(level)


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run tests on the event loop that gateways and engines are deployed on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Have what tests print as text that can go from one process to another.

    Some are about text that cannot: half a pair of surrogates.
    """
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show what tests have measured (`record_property("figures", …)`), from all processes."""
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        for name, value in report.user_properties:
            if name == "figures" and report.when == "call":
                terminalreporter.section(report.nodeid.partition("::")[2])
                terminalreporter.write_line(value)


def _is_worker(config: pytest.Config) -> bool:
    """Whether xdist runs this process; not one that a test starts, which has its environment."""
    return hasattr(config, "workerinput")


def _is_large(item: pytest.Item) -> bool:
    """Whether it starts whole services, or real engines."""
    return item.get_closest_marker("engine") is not None or "system" in item.path.parts


def _cost(item: pytest.Item) -> int:
    if item.get_closest_marker("engine"):
        return 2
    return 0 if "router" in item.path.parts else 1
