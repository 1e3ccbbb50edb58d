"""LangChain's client, through a gateway with a real engine of the tiny model."""

import pytest

from tests.conformance.clients.langchain_openai_sdk import talk
from tests.serving.engine.conftest import Served

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def test_langchain_gets_what_it_asks_for(served: Served) -> None:
    """Objects and tools are for models that end their JSON: see `tests.conformance.clients`."""
    talk(str(served.http.base_url), "tiny")
