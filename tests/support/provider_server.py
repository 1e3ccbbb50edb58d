"""A provider to test against: a real HTTP server that counts as strictly as one can."""

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

from aiohttp import web

from router.limits.rate_limit import RateLimiterState
from router.resilience.breaker import BreakerView
from tests.support.running_gateway import System

MODEL = "their-model"
MODELS = {"fake-model": MODEL}  # ours by name, theirs
NUMBERS = tuple("0123456789")  # words of a reply


@dataclass(frozen=True)
class Script:
    """A reply byte by byte, and what becomes of the connection after it."""

    body: bytes
    tail: bytes = b""  # comes a little later
    end: Literal["whole", "broken", "open", "comments"] = "whole"
    status: int = 200
    content_type: str = "text/event-stream"


@dataclass
class ProviderServer:
    """Enforces its own sliding windows and says in OpenAI's headers how much is left."""

    rpm: int = 1_000_000
    tpm: int = 1_000_000_000
    ttft_s: float = 0.0
    token_s: float = 0.0
    api_key: str | None = None
    sends_headers: bool = True
    max_events: int = 1_000_000  # in one stream, several tokens each where there are more
    trouble: str | None = None
    words: tuple[str, ...] = ()  # its tokens, if not its name; goes on where another stopped
    script: "Script | None" = None  # what it answers to everything
    url: str = ""
    name: str = "provider"
    first_s: float | None = None
    num_refused: int = 0
    num_taken: int = 0
    num_tokens_taken: int = 0
    num_open: int = 0
    num_begun: int = 0  # of these, streams whose first token is out
    bodies: list[dict] = field(default_factory=list)
    refusals_s: list[float] = field(default_factory=list)  # since the first request
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    _log: deque[tuple[float, int]] = field(default_factory=deque)
    _transports: set[asyncio.Transport] = field(default_factory=set)  # with an open reply

    def __post_init__(self) -> None:
        self.gate.set()

    def take(self, num_tokens: int, now_s: float) -> tuple[bool, dict[str, str]]:
        """Whether the windows have room for a request, and the headers to say so with."""
        while self._log and self._log[0][0] <= now_s - 60.0:
            self._log.popleft()
        used = sum(tokens for _, tokens in self._log)
        taken = len(self._log) < self.rpm and used + num_tokens <= self.tpm
        headers = {}
        if taken:
            self._log.append((now_s, num_tokens))
            used += num_tokens
            self.num_taken += 1
            self.num_tokens_taken += num_tokens
        else:
            self.num_refused += 1
        if self.sends_headers:
            headers = {
                "x-ratelimit-limit-requests": str(self.rpm),
                "x-ratelimit-remaining-requests": str(max(0, self.rpm - len(self._log))),
                "x-ratelimit-limit-tokens": str(self.tpm),
                "x-ratelimit-remaining-tokens": str(max(0, self.tpm - used)),
            }
        return taken, headers

    def cut(self) -> None:
        """Break every open reply off, as the kernel does for a process that is killed."""
        for transport in self._transports:
            transport.abort()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions, streamed or not."""
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return _error(401, "Incorrect API key provided")
        body = await request.json()
        self.bodies.append(body)
        if self.script is not None:
            return await self._play(request, self.script)
        now_s = asyncio.get_running_loop().time()
        if self.first_s is None:
            self.first_s = now_s
        num_prompt_tokens = sum(len(m["content"].split()) for m in body["messages"])
        num_output_tokens = body.get("max_tokens", 16)
        taken, headers = self.take(num_prompt_tokens + num_output_tokens, now_s)
        if not taken:
            self.refusals_s.append(now_s - self.first_s)
            return _error(429, "Rate limit reached", headers)
        if self.trouble == "error":
            return _error(500, "Internal error", headers)
        if self.trouble == "client error":
            return _error(400, "No such field", headers)
        if self.trouble == "no money":
            return _error(429, "You exceeded your quota", headers, code="insufficient_quota")
        self.num_open += 1
        self._transports.add(request.transport)
        try:
            usage = {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_output_tokens}
            if not body.get("stream"):
                await asyncio.sleep(self.ttft_s + self.token_s * num_output_tokens)
                content = " ".join(self.name for _ in range(num_output_tokens))
                reply = {"model": MODEL, "usage": usage, "choices": [_choice("message", content)]}
                return web.json_response(reply, headers=headers)
            return await self._stream(request, body, num_output_tokens, usage, headers)
        finally:
            self.num_open -= 1
            self._transports.discard(request.transport)

    async def _play(self, request: web.Request, script: Script) -> web.StreamResponse:
        headers = {"content-type": script.content_type}
        response = web.StreamResponse(status=script.status, headers=headers)
        await response.prepare(request)
        await response.write(script.body)
        if script.tail:
            await asyncio.sleep(0.05)
            await response.write(script.tail)
        if script.end == "broken":
            request.transport.close()
        while script.end in ("open", "comments"):
            await asyncio.sleep(0.05)
            if script.end == "comments":
                await response.write(b": ping\n\n")
        return response

    async def _stream(self, request, body, num_tokens, usage, headers) -> web.StreamResponse:
        response = web.StreamResponse(headers={**headers, "content-type": "text/event-stream"})
        await response.prepare(request)
        if self.trouble == "silence":
            await asyncio.sleep(1000)
        await asyncio.sleep(self.ttft_s)
        if self.trouble == "error event":
            await response.write(b'data: {"error": {"message": "out of memory"}}\n\n')
            return response
        self.num_begun += 1
        try:
            return await self._write(request, response, body, num_tokens, usage)
        finally:
            self.num_begun -= 1

    async def _write(self, request, response, body, num_tokens, usage) -> web.StreamResponse:
        said = body["messages"][-1] if body.get("continue_final_message") else {"content": ""}
        first = len(said["content"].split())
        for number in range(min(num_tokens, self.max_events)):
            if number == 2 and self.trouble == "stall":
                await asyncio.sleep(1000)
            if number == 2 and self.trouble == "break":
                request.transport.close()
                return response
            await self.gate.wait()
            word = self.words[first + number] if self.words else self.name
            chunk = {"id": self.name, "model": MODEL, "choices": [_choice("delta", f"{word} ")]}
            if number == num_tokens - 1:
                chunk["choices"][0]["finish_reason"] = "length"
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
            await asyncio.sleep(self.token_s)
        if (body.get("stream_options") or {}).get("include_usage"):
            last = {"model": MODEL, "choices": [], "usage": usage}
            await response.write(b"data: " + json.dumps(last).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


def _choice(kind: str, content: str) -> dict:
    return {"index": 0, kind: {"role": "assistant", "content": content}}


def _error(status: int, message: str, headers=None, code: str | None = None) -> web.Response:
    error = {"error": {"message": message, "type": "error", "code": code}}
    return web.json_response(error, status=status, headers=headers)


@contextlib.asynccontextmanager
async def serving(port: int = 0, **fields) -> AsyncIterator[ProviderServer]:
    """A provider at `url`, until the block ends or `stop` is called."""
    server = ProviderServer(**fields)
    async with listening(server, port):
        yield server


@contextlib.asynccontextmanager
async def listening(server: ProviderServer, port: int = 0) -> AsyncIterator[int]:
    """The port on which the server answers within the block; then open streams break."""
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/v1/{path:.*}", server.answer)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, reuse_address=True)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    server.url = f"http://127.0.0.1:{port}/v1"
    try:
        yield port
    finally:
        await runner.cleanup()


def configured(*servers: ProviderServer, **fields) -> dict:
    """The section `providers` for these servers."""
    return {
        "providers": [
            {"name": f"p{number}", "url": server.url, "models": MODELS, "ttft_s": 0.05, **fields}
            for number, server in enumerate(servers)
        ]
    }


def budget(system: System, name: str = "p0") -> RateLimiterState:
    providers = system.gateway.state().fallback.providers
    return providers[name].keys["default"].budget


def breaker(system: System, name: str = "p0") -> BreakerView:
    providers = system.gateway.state().fallback.providers
    return providers[name].keys["default"].breaker
