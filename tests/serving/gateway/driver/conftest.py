"""A driver whose clock stands still."""

from types import SimpleNamespace

import pytest

from serving.gateway import driver as module
from tests.serving.gateway.driver.world import NOW_S, WALL_S, World


@pytest.fixture
async def world(monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: NOW_S, time=lambda: WALL_S)
    monkeypatch.setattr(module, "time", clock)
    return World()
