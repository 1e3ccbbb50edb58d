"""Connections as chance makes them: requests of all kinds, cut anywhere, answered in turn."""

import asyncio
import json
import random

import pytest

from tests.serving.gateway.http.raw_client import connected, get, post
from tests.support.running_gateway import CHAT, System, running

OFFERS = (
    ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQAAP__"),
    ("upgrade: websocket", "connection: keep-alive, upgrade"),
    (),
    (),
)


def _chunked(rng: random.Random, request: bytes) -> bytes:
    """The same request with its body in chunks."""
    head, _, body = request.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"content-length")]
    chunks = b""
    while body:
        size = rng.randint(1, 40)
        chunks += b"%x\r\n%b\r\n" % (len(body[:size]), body[:size])
        body = body[size:]
    trailer = rng.choice([b"", b"x-trailer: 1\r\n"])
    lines.append(b"transfer-encoding: chunked")
    return b"\r\n".join(lines) + b"\r\n\r\n" + chunks + b"0\r\n" + trailer + b"\r\n"


def _make_request(rng: random.Random, system: System, name: str) -> tuple[bytes, int, bytes]:
    """A request of this id, the status of its reply, and how its body ends."""
    headers = [*rng.choice(OFFERS), f"x-request-id: {name}"]
    rng.shuffle(headers)
    kind = rng.randrange(5)
    if kind == 0:
        return get("/v1/models", *headers), 200, b"}"
    if kind == 1:
        return get("/v1/nothing", *headers), 404, b"}"
    if kind == 2:
        hidden = get("/headway/state") * rng.randint(1, 3)
        request, status, end = post(hidden, *headers), 400, b"}"
    elif kind == 3:
        request, status, end = post(b"{}", *headers, path="/v1/embeddings"), 400, b"}"
    else:
        body = system.chat(max_tokens=rng.randint(1, 5), padding="x" * rng.randint(0, 3000))
        request, status, end = post(json.dumps(body).encode(), *headers), 200, b"[DONE]\n\n"
    return (_chunked(rng, request) if rng.random() < 0.4 else request), status, end


@pytest.mark.parametrize("seed", range(60))
async def test_every_request_is_answered_once_in_turn_and_by_its_own_reply(seed):
    rng = random.Random(seed)
    async with running(num_engines=1) as system, connected(system) as client:
        names = [f"r{number}" for number in range(rng.randint(1, 8))]
        requests = [_make_request(rng, system, name) for name in names]
        data = b"".join(request for request, _, _ in requests)

        async def send() -> None:
            rest = data
            while rest:
                size = rng.choice([1, 7, 100, 2_000, len(rest)])
                client.send(rest[:size])
                rest = rest[size:]
                await asyncio.sleep(rng.choice([0, 0, 0, 0.002]))

        sending = asyncio.create_task(send())
        for name, (_, status, end) in zip(names, requests, strict=True):
            reply = await client.read_reply()
            assert reply.headers["x-request-id"] == name, seed
            assert reply.status == status, seed
            assert reply.body.endswith(end), seed
        await sending
        client.send(get(CHAT, "connection: close"))
        assert (await client.read_reply()).status == 405
        assert await client.is_closed()
        system.assert_empty()
