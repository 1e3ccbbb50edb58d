"""What tests of batches share: lines, and a gateway that runs them over fake engines."""

import asyncio
import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

from openai import AsyncOpenAI

from tests.support.running_gateway import System, running

CHAT = "/v1/chat/completions"
ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
}
_clients: list[AsyncOpenAI] = []  # to be closed with what they ask
FINAL = ("completed", "failed", "expired", "cancelled")


def line(number: int, url: str = CHAT, **fields) -> dict:
    messages = [{"role": "user", "content": f"question {number}"}]
    body = {"model": "fake-model", "messages": messages, "max_tokens": 1, **fields}
    return {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": body}


def jsonl(lines: Iterable[dict]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def parsed(content: bytes) -> list[dict]:
    return [json.loads(each) for each in content.splitlines()]


@contextlib.asynccontextmanager
async def batches_running(folder: Path, num_engines: int = 1, **settings):
    """A gateway with a folder for batches, whose engines answer with `ANSWER`; and a client."""
    batch = {"dir": str(folder), **settings.pop("batch", {})}
    async with running(num_engines, batch=batch, **settings) as system:
        for engine in system.engines:
            answer_with(engine)
        try:
            yield system, client_of(system)
        finally:
            while _clients:
                await _clients.pop().close()


def answer_with(engine, answer: dict | None = None, status: int = 200) -> None:
    engine.chunk, engine.end = json.dumps(answer or ANSWER).encode(), b""
    engine.headers = [(b"content-type", b"application/json")]
    engine.status = status


def client_of(system: System, key: str = "none") -> AsyncOpenAI:
    client = AsyncOpenAI(base_url=f"{system.client.base_url}/v1", api_key=key, max_retries=0)
    _clients.append(client)
    return client


async def upload(client: AsyncOpenAI, lines: Iterable[dict] | bytes):
    content = lines if isinstance(lines, bytes) else jsonl(lines)
    return await client.files.create(file=("in.jsonl", content), purpose="batch")


async def begin(client: AsyncOpenAI, lines: Iterable[dict] | bytes, endpoint: str = CHAT, **fields):
    file = await upload(client, lines)
    window = fields.pop("completion_window", "24h")
    return await client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window=window, **fields
    )


async def ended(client: AsyncOpenAI, batch, timeout_s: float = 20.0):
    """The batch once it has ended."""
    async with asyncio.timeout(timeout_s):
        while (found := await client.batches.retrieve(batch.id)).status not in FINAL:
            await asyncio.sleep(0.02)
    return found


async def content(client: AsyncOpenAI, file_id: str) -> list[dict]:
    return parsed((await client.files.content(file_id)).content)
