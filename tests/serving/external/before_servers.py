"""A gateway before fake servers, and what its replies say."""

import contextlib
import json

import httpx

from tests.serving.external.fake_vllm import FakeVllm, listening, prompt_ids, words
from tests.support.running_gateway import System, running

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
BODY = {"model": "tiny", "messages": HELLO, "stream": True, "max_tokens": 8}
SAID = words(prompt_ids(HELLO), 8)


@contextlib.asynccontextmanager
async def attached(*servers: FakeVllm, settings=None, external=None, num_up: int | None = None):
    """A gateway before these servers, up."""
    async with contextlib.AsyncExitStack() as stack:
        for server in servers:
            await stack.enter_async_context(listening(server))
        configs = [{"url": server.url, **(external or {})} for server in servers]
        system = await stack.enter_async_context(running(0, external=configs, **(settings or {})))
        count = len(servers) if num_up is None else num_up
        await system.until(lambda: len(infos(system)) == count)
        yield system


def infos(system: System) -> dict:
    return system.gateway.driver.engines.infos


def content(text: str) -> str:
    """What the events of a stream say, which ends as it should."""
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]", text
    chunks = [json.loads(event) for event in events[:-1]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert len({chunk["created"] for chunk in chunks}) == 1
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert not any(choice.get("token_ids") for choice in choices)
    assert not any(chunk.get("prompt_token_ids") for chunk in chunks)
    assert sum("role" in choice.get("delta", {}) for choice in choices) <= 1
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    return "".join(
        choice["delta"].get("content", "") if "delta" in choice else choice["text"]
        for choice in choices
    )


async def ask(system: System, path: str = CHAT, **fields) -> httpx.Response:
    return await system.client.post(path, json={**BODY, **fields})
