"""The clients that people have, through a gateway with a real engine of the tiny model."""

from collections.abc import Callable

import pytest

from tests.conformance.clients import anthropic_sdk, langchain_openai_sdk, openai_sdk
from tests.serving.engine.conftest import Served

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(openai_sdk.main, id="openai"),
        pytest.param(anthropic_sdk.main, id="anthropic"),
        pytest.param(langchain_openai_sdk.main, id="langchain-openai"),
    ],
)
def test_a_client_gets_what_it_asks_for(served: Served, ask: Callable[[str, str], None]) -> None:
    """Those that fit beside what is installed; `tests.conformance.clients` has the others."""
    ask(str(served.http.base_url), "tiny")
