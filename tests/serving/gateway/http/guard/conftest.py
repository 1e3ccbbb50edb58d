"""No connection outlives its test."""

import pytest

from tests.serving.gateway.http.guard.wire import Wire


@pytest.fixture(autouse=True)
async def end_connections():
    yield
    for wire in Wire.made:
        await wire.end()
    Wire.made.clear()
