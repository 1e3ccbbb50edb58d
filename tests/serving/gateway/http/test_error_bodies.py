"""An error of ours is to programs what vLLM's own is for the same fault."""

import argparse
import json

import httpx
import pytest
from fastapi import Depends, FastAPI

from tests.support.running_gateway import CHAT, running

COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def plain_vllm() -> FastAPI:
    """vLLM's own routes' way from a body to an error, without an engine behind it."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
    from vllm.entrypoints.serve.utils.api_utils import validate_json_request

    app = FastAPI()
    app.state.args = argparse.Namespace(log_error_stack=False)
    init_exception_handler(app)

    @app.post(CHAT, dependencies=[Depends(validate_json_request)])
    async def chat(request: ChatCompletionRequest) -> None: ...

    @app.post(COMPLETIONS, dependencies=[Depends(validate_json_request)])
    async def complete(request: CompletionRequest) -> None: ...

    return app


async def _asked(client: httpx.AsyncClient, path: str, body: bytes) -> tuple:
    """Status, and what programs compare of the error."""
    reply = await client.post(path, content=body, headers={"content-type": "application/json"})
    error = reply.json()["error"]
    assert error["message"]
    return reply.status_code, error["type"], error["param"], error["code"]


BODIES = {
    "no JSON": (CHAT, b"{"),
    "no JSON further on": (CHAT, b'{"model": "fake-model", "messages": [}'),
    "nothing": (CHAT, b""),
    "no object": (CHAT, b"[1]"),
    "a text": (CHAT, b'"hi"'),
    "no messages": (CHAT, {"model": "fake-model"}),
    # Null and numbers are as wrong; vLLM trips over them and tells of that.
    "messages a text": (CHAT, {"messages": "hi"}),
    "messages an object": (CHAT, {"messages": {}}),
    "max_tokens a text": (CHAT, {"messages": MESSAGES, "max_tokens": "many"}),
    "max_tokens a fraction": (CHAT, {"messages": MESSAGES, "max_tokens": 1.5}),
    "n a list": (CHAT, {"messages": MESSAGES, "n": []}),
    "stream a text": (CHAT, {"messages": MESSAGES, "stream": "maybe"}),
    "model a number": (CHAT, {"messages": MESSAGES, "model": 1}),
    "no prompt": (COMPLETIONS, {"model": "fake-model"}),
    "prompt null": (COMPLETIONS, {"prompt": None}),
}


@pytest.mark.parametrize(("path", "body"), BODIES.values(), ids=BODIES)
async def test_a_body_that_cannot_be_read(plain_vllm, path, body):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    transport = httpx.ASGITransport(plain_vllm, raise_app_exceptions=False)
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://vllm") as vllm,
        running(num_engines=1) as system,
    ):
        assert await _asked(system.client, path, content) == await _asked(vllm, path, content)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_model_that_there_is_not(path):
    """vLLM's `_check_model` needs an engine: its values, read in the source of 0.32."""
    async with running(num_engines=1) as system:
        body = json.dumps({"model": "none", "messages": MESSAGES, "prompt": "hi"}).encode()
        assert await _asked(system.client, path, body) == (404, "NotFoundError", "model", 404)
