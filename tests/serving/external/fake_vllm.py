"""A server that speaks as `vllm serve` does, with a model of its own: each token by the one before.

So a completion of the ids of a prompt and of tokens goes on as the reply would have gone on.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from aiohttp import web


def next_id(token_id: int) -> int:
    return (token_id * 31 + 7) % 997 + 3


def prompt_ids(messages: list[dict]) -> list[int]:
    return [ord(letter) for message in messages for letter in message["content"]] or [1]


def words(ids: list[int], num_tokens: int) -> str:
    """The reply to a prompt, as far as so many tokens."""
    last, said = ids[-1], ""
    for _ in range(num_tokens):
        last = next_id(last)
        said += f" w{last}"
    return said


@dataclass
class FakeVllm:
    model: str = "tiny"
    key: str | None = None
    token_s: float = 0.0
    owned_by: str = "vllm"
    max_model_len: int = 4096
    has_metrics: bool = True
    knows_names: bool = True  # of the metrics that are asked for
    tells_ids: bool = True
    is_dead: bool = False
    trouble: str | None = None
    break_after: int | None = None  # tokens, after which one connection is cut
    url: str = ""
    num_running: int = 0
    num_others: int = 0
    num_first_tokens: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_steps: int = 0
    bodies: list[dict] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    _transports: set[asyncio.Transport] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.gate.set()

    def cut(self) -> None:
        """Break every open reply off."""
        for transport in list(self._transports):
            transport.abort()

    def refuses(self, request: web.Request) -> web.Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return None

    async def models(self, request: web.Request) -> web.Response:
        if (refusal := self.refuses(request)) is not None:
            return refusal
        card = {"id": self.model, "owned_by": self.owned_by, "root": self.model}
        if self.owned_by == "vllm":
            card["max_model_len"] = self.max_model_len
        return web.json_response({"object": "list", "data": [card]})

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self.is_dead else 200)

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    async def metrics(self, request: web.Request) -> web.Response:
        if not self.has_metrics:
            return web.Response(status=404)
        if request.path.endswith("/") and not self.knows_names:
            return web.Response(status=404)
        label = f'{{engine="0",model_name="{self.model}"}}'
        lines = [
            "# HELP vllm:num_requests_running Number of requests",
            f"vllm:num_requests_running{label} {float(self.num_running + self.num_others)}",
            f"vllm:num_requests_waiting{label} 0.0",
            f"vllm:kv_cache_usage_perc{label} 0.25",
            f"vllm:prompt_tokens_total{label} {float(self.num_prompt_tokens)}",
            f"vllm:generation_tokens_total{label} {float(self.num_output_tokens)}",
            f"vllm:iteration_tokens_total_count{label} {float(self.num_steps)}",
            f"vllm:time_to_first_token_seconds_count{label} {float(self.num_first_tokens)}",
            'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1000"} 1.0',
        ]
        return web.Response(text="\n".join(lines) + "\n")

    async def complete(self, request: web.Request) -> web.StreamResponse:
        if (refusal := self.refuses(request)) is not None:
            return refusal
        body = await request.json()
        self.bodies.append(body)
        self.paths.append(request.path)
        self.headers.append(dict(request.headers))
        if self.trouble == "500":
            return web.json_response({"error": {"message": "no", "code": 500}}, status=500)
        if self.trouble == "400":
            return web.json_response({"error": {"message": "wrong", "code": 400}}, status=400)
        if self.trouble == "redirect":
            return web.Response(status=307, headers={"location": "http://elsewhere/"})
        if body.get("priority"):
            return web.json_response({"error": {"message": "no priorities"}}, status=400)
        is_chat = request.path.endswith("/chat/completions")
        if is_chat:
            ids = prompt_ids(body["messages"])
        else:
            prompt = body["prompt"]
            ids = prompt if isinstance(prompt, list) else [ord(letter) for letter in prompt]
        num_tokens = body.get("max_tokens", 16)
        self.num_running += 1
        self.num_prompt_tokens += len(ids)
        self._transports.add(request.transport)
        try:
            await self.gate.wait()
            usage = {"prompt_tokens": len(ids), "completion_tokens": num_tokens}
            if not body.get("stream"):
                await asyncio.sleep(self.token_s * num_tokens)
                self.num_first_tokens += 1
                self.num_output_tokens += num_tokens
                said = words(ids, num_tokens)
                choice = {"index": 0, "message": {"role": "assistant", "content": said}}
                return web.json_response({"model": self.model, "choices": [choice], "usage": usage})
            return await self._stream(request, body, ids, num_tokens, is_chat, usage)
        finally:
            self.num_running -= 1
            self._transports.discard(request.transport)

    async def _stream(self, request, body, ids, num_tokens, is_chat, usage) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        if self.trouble == "error event":
            await response.write(b'data: {"error":{"message":"died","code":500}}\n\n')
            await response.write(b"data: [DONE]\n\n")
            return response
        if self.trouble == "bad request event":
            await response.write(b'data: {"error":{"message":"wrong","code":400}}\n\n')
            await response.write(b"data: [DONE]\n\n")
            return response
        wants_ids = body.get("return_token_ids") and self.tells_ids
        kind = "chat.completion.chunk" if is_chat else "text_completion"
        head = {"id": f"id-of-{self.url}", "object": kind, "created": 1, "model": self.model}
        if is_chat:
            first = {**head, "choices": [_choice({"delta": {"role": "assistant", "content": ""}})]}
            first["prompt_token_ids"] = ids if wants_ids else None
            await response.write(_event(first))
        last = ids[-1]
        for number in range(num_tokens):
            await self.gate.wait()
            if self.break_after == number:
                self.break_after = None
                request.transport.abort()
                return response
            last = next_id(last)
            said = f" w{last}"
            choice = _choice({"delta": {"content": said}} if is_chat else {"text": said})
            if not is_chat:
                choice["prompt_token_ids"] = ids if wants_ids and not number else None
            if number == num_tokens - 1:
                choice["finish_reason"] = "length"
            choice["token_ids"] = [last] if wants_ids else None
            self.num_output_tokens += 1
            self.num_first_tokens += not number
            self.num_steps += 1
            await response.write(_event({**head, "choices": [choice]}))
            await asyncio.sleep(self.token_s)
        if (body.get("stream_options") or {}).get("include_usage"):
            await response.write(_event({**head, "choices": [], "usage": usage}))
        if self.trouble != "no end":
            await response.write(b"data: [DONE]\n\n")
        return response


def _choice(fields: dict) -> dict:
    return {"index": 0, **fields, "logprobs": None, "finish_reason": None}


def _event(chunk: dict) -> bytes:
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


@contextlib.asynccontextmanager
async def listening(server: FakeVllm, port: int = 0, **site_fields) -> AsyncIterator[int]:
    """The port on which the server answers within the block; then open replies break."""
    app = web.Application(client_max_size=2**26)
    app.router.add_get("/v1/models", server.models)
    app.router.add_get("/health", server.health)
    app.router.add_get("/version", server.version)
    app.router.add_get("/metrics", server.metrics)
    app.router.add_get("/metrics/", server.metrics)
    app.router.add_post("/v1/{path:.*}", server.complete)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, reuse_address=True, **site_fields)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    scheme = "https" if site_fields.get("ssl_context") else "http"
    server.url = f"{scheme}://127.0.0.1:{port}"
    try:
        yield port
    finally:
        server.cut()
        await runner.cleanup()
