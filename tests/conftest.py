"""Order and selection of all tests, and how many examples generated ones go through.

A hundred each or what they say, new ones in every run; `make test
ARGS=--hypothesis-profile=long` goes through 2,500, for changes to the router.
"""

import ctypes

# Hypothesis loads modules late, deep in pytest's own frames: where a test has
# failed, Python 3.11's parser then breaks off the whole report.
import hypothesis.internal.observability  # noqa: F401
import pytest
from hypothesis import settings

settings.register_profile("long", max_examples=2500)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the core's tests first and real engines last; skip GPU tests where no driver is."""
    items.sort(key=_cost)  # stable: within a kind the order stays
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip("no NVIDIA driver"))


def _cost(item: pytest.Item) -> int:
    if item.get_closest_marker("gpu") or item.get_closest_marker("engine"):
        return 2
    return 0 if "router" in item.path.parts else 1
