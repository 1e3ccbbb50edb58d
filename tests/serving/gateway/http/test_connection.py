"""One connection as clients really use it: offers of other protocols, early bytes, old versions."""

import asyncio
import contextlib

import pytest

from serving.gateway.http.connections import Connections, fitting_connections
from tests.serving.gateway.http.raw_client import RawClient, connected, get, post
from tests.support.running_gateway import running

H2C = ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQAAP__")
WEBSOCKET = ("connection: keep-alive, Upgrade", "upgrade: websocket", "sec-websocket-version: 13")


@pytest.mark.parametrize("offer", [H2C, WEBSOCKET], ids=["h2c", "websocket"])
@pytest.mark.parametrize("pieces", ["whole", "head and body", "bytes"])
async def test_an_offer_of_another_protocol_is_not_taken_up(offer, pieces):
    """The JDK's client and `curl --http2` make one with every first request."""
    async with running(num_engines=1) as system, connected(system) as client:
        body = system.chat(max_tokens=2)
        request = post(body, *offer, "x-request-id: mine")
        if pieces == "bytes":
            for byte in request:
                client.send(bytes([byte]))
                await asyncio.sleep(0)
        elif pieces == "whole":
            client.send(request)
        else:
            head, _, content = request.partition(b"\r\n\r\n")
            client.send(head + b"\r\n\r\n")
            await asyncio.sleep(0.05)
            client.send(content)
        reply = await client.read_reply()
        assert reply.status == 200
        assert reply.body.endswith(b"data: [DONE]\n\n")
        assert "upgrade" not in reply.headers
        assert system.engines[0].bodies == [body]
        client.send(get("/v1/models"))  # and the connection goes on
        assert (await client.read_reply()).status == 200
        system.assert_empty()


async def test_a_body_after_an_offer_is_never_a_request():
    """Else a page that may send a body could send a request with any headers."""
    async with running(num_engines=1) as system, connected(system) as client:
        hidden = post({"policy": "round_robin"}, path="/headway/policy")
        client.send(post(hidden, *H2C))
        reply = await client.read_reply()
        assert reply.status == 400
        assert "JSON" in reply.error["message"]
        assert system.gateway.state().policy == "headway"
        client.send(get("/v1/models"))
        assert (await client.read_reply()).status == 200


async def test_an_offer_behind_another_request_is_not_taken_up_either():
    async with running(num_engines=1) as system, connected(system) as client:
        body = system.chat(stream=False)
        client.send(post(body) + post(body, *H2C))
        assert [(await client.read_reply()).status for _ in range(2)] == [200, 200]
        assert system.engines[0].bodies == [body, body]


async def test_no_tunnel_is_opened():
    async with running(num_engines=1) as system, connected(system) as client:
        client.send(b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com:443\r\n\r\nhidden")
        reply = await client.read_reply()
        assert reply.status == 405
        assert reply.error["code"] == 405
        assert await client.is_closed()


EARLY = {
    "empty lines": b"\r\n\r\n",
    "a space": b" ",
    "half a head": b"GET /v1/models HT",
    "half a body": post(b"12345678")[:-4],
    "no HTTP": b"\x00\x01\x02",
    "a request": get("/v1/models"),
    "many requests": get("/v1/models") * 300,
}


@pytest.mark.parametrize("early", EARLY.values(), ids=EARLY)
@pytest.mark.parametrize("when", ["at once", "later"])
async def test_bytes_that_come_early_do_not_cut_a_stream(early, when):
    limits = {"head_timeout_s": 0.2, "body_timeout_s": 0.2}
    async with running(num_engines=1, gateway=limits) as system, connected(system) as client:
        system.engines[0].gate.clear()
        request = post(system.chat(max_tokens=3))
        if when == "at once":
            client.send(request + early)
        else:
            client.send(request)
            await system.until(lambda: system.num_engine_streams == 1)
            client.send(early)
        await asyncio.sleep(0.5)  # longer than all limits
        system.engines[0].gate.set()
        reply = await client.read_reply()
        assert reply.status == 200
        assert reply.body.count(b"data: {}") == 3
        assert reply.body.endswith(b"data: [DONE]\n\n")
        await system.until(lambda: system.outcomes["completed"] == 1)
        system.assert_empty()


async def test_requests_that_come_early_are_answered_in_turn():
    async with running(num_engines=1) as system, connected(system) as client:
        for _ in range(2):
            client.send(post(system.chat(max_tokens=3)) + get("/v1/models"))
        await asyncio.sleep(0.1)
        client.send(get("/v1/nothing"))
        replies = [await client.read_reply() for _ in range(5)]
        assert [reply.status for reply in replies] == [200, 200, 200, 200, 404]
        assert all(reply.body.endswith(b"[DONE]\n\n") for reply in replies[0:3:2])


async def test_no_more_is_kept_of_what_comes_early_than_one_head_may_have():
    limits = {"max_head_bytes": 10_000}
    async with running(num_engines=1, gateway=limits) as system, connected(system) as client:
        system.engines[0].gate.clear()
        client.send(post(system.chat(max_tokens=3)))
        await system.until(lambda: system.num_engine_streams == 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.send_all(b"x" * 100_000, pieces=1000), 1.0)
        system.engines[0].gate.set()
        reply = await client.read_reply()
        assert reply.body.endswith(b"data: [DONE]\n\n")


async def test_a_reply_that_comes_before_the_bodys_end_does_not_end_the_connection():
    limits = {"body_timeout_s": 0.3}
    async with running(num_engines=1, gateway=limits) as system, connected(system) as client:
        whole = post(b"x" * 1000, path="/v1/nothing")
        client.send(whole[:-10])
        assert (await client.read_reply()).status == 404
        client.send(whole[-10:])
        await asyncio.sleep(0.6)
        system.engines[0].gate.clear()
        client.send(post(system.chat(max_tokens=2)))
        await asyncio.sleep(0.6)
        system.engines[0].gate.set()
        assert (await client.read_reply()).body.endswith(b"[DONE]\n\n")
        client.send(whole[:-10])
        assert (await client.read_reply()).status == 404
        assert await client.is_closed()  # its rest does not come


async def test_who_sends_early_and_leaves_frees_the_engine():
    async with running(num_engines=1) as system:
        system.engines[0].gate.clear()
        async with connected(system) as client:
            client.send(post(system.chat(max_tokens=3)) + get("/v1/models") + post(system.chat()))
            await system.until(lambda: system.num_engine_streams == 1)
        await system.until(lambda: system.outcomes["reneged"] == 1)
        await system.until(lambda: system.num_engine_streams == 0)
        system.assert_empty()


async def test_what_is_no_request_is_refused_after_the_reply_before_it():
    async with running(num_engines=1) as system, connected(system) as client:
        client.send(post(system.chat(max_tokens=2)) + b"\x00\x01")
        assert (await client.read_reply()).body.endswith(b"[DONE]\n\n")
        refused = await client.read_reply()
        assert refused.status == 400
        assert refused.error["type"] == "Bad Request"
        assert await client.is_closed()


async def test_a_stream_over_http_1_0_has_no_chunks_and_ends_with_its_connection():
    async with running(num_engines=1) as system, connected(system) as client:
        client.send(post(system.chat(max_tokens=2), version="1.0"))
        raw = await client.reader.read()
        head, _, body = raw.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert b"transfer-encoding" not in head
        assert body == b"data: {}\n\n" * 2 + b"data: [DONE]\n\n"
        system.assert_empty()


async def _refused(client: RawClient) -> int:
    """The status of an error in OpenAI's form, after which the connection ends."""
    reply = await client.read_reply()
    assert reply.error["code"] == reply.status
    assert reply.headers["connection"] == "close"
    assert await client.is_closed()
    return reply.status


NOT_HTTP = {
    "noise": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "a bad version": b"GET /v1/models HTTP/x\r\n\r\n",
    "http 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "two lengths": post(b"{}", "content-length: 7"),
    "a bad length": b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: x\r\n\r\n",
    "a bad chunk": b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
    "a bad url": b"GET http://[/v1/models HTTP/1.1\r\n\r\n",
    "a control character": b"GET /v1/models HTTP/1.1\r\nx: a\x00b\r\n\r\n",
}


@pytest.mark.parametrize("data", NOT_HTTP.values(), ids=NOT_HTTP)
async def test_what_is_not_http_is_refused_in_openais_form(data):
    async with running(num_engines=1) as system, connected(system) as client:
        client.send(data)
        assert await _refused(client) == 400


@pytest.mark.parametrize("version", ["", " HTTP/0.9", " HTTP/2.0"])
async def test_other_versions_of_http_are_refused(version):
    async with running(num_engines=1) as system, connected(system) as client:
        client.send(b"GET /v1/models%b\r\n\r\n" % version.encode())
        assert await _refused(client) in (400, 505)


@pytest.mark.parametrize("in_one_read", [True, False])
@pytest.mark.parametrize("of", ["many headers", "one header", "the path"])
async def test_a_head_that_is_too_large_is_refused(of, in_one_read):
    limits = {"max_head_bytes": 5_000}
    async with running(num_engines=1, gateway=limits) as system, connected(system) as client:
        body = system.chat(stream=False)
        many = {
            "many headers": post(body, *(f"x-{number}: {'y' * 90}" for number in range(100))),
            "one header": post(body, f"x: {'y' * 10_000}"),
            "the path": post(body, path=f"/v1/chat/completions?{'y' * 10_000}"),
        }[of]
        if in_one_read:
            client.send(many)
        else:
            for start in range(0, len(many), 1_000):
                client.send(many[start : start + 1_000])
                await asyncio.sleep(0.01)
        assert await _refused(client) == 431
        assert not system.engines[0].bodies


async def test_a_long_body_is_no_long_head():
    limits = {"max_head_bytes": 2_000}
    async with running(num_engines=1, gateway=limits) as system, connected(system) as client:
        content = [{"role": "user", "content": "word " * 10_000}]
        for _ in range(2):
            client.send(post(system.chat(messages=content, stream=False)))
            assert (await client.read_reply()).status == 200


async def test_trailers_are_bounded_and_not_headers():
    limits = {"max_head_bytes": 5_000}
    begin = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    async with running(num_engines=1, gateway=limits) as system:
        async with connected(system) as client:
            client.send(begin + b"2\r\n{}\r\n0\r\n")
            client.send(b"".join(b"x-%d: %b\r\n" % (number, b"y" * 90) for number in range(1000)))
            assert await _refused(client) == 431
        async with connected(system) as client:
            client.send(begin + b"2\r\n{}\r\n0\r\nx-headway-class: royal\r\n\r\n")
            assert "messages" in (await client.read_reply()).error["message"]


async def test_who_is_one_too_many_is_told_so_and_who_is_in_stays_in():
    async with running(gateway={"max_connections": 1}) as system, connected(system) as first:
        async with connected(system) as second:
            second.send(post(system.chat()))
            assert await _refused(second) == 503
            first.send(get("/v1/models"))
            assert (await first.read_reply()).status == 200
        await system.until(lambda: len(system.gateway.app.connections) == 1)
        async with connected(system) as third:
            await system.until(lambda: len(system.gateway.app.connections) == 2)
            first.send(get("/v1/models", "connection: close"))
            assert (await first.read_reply()).status == 200
            await system.until(lambda: len(system.gateway.app.connections) == 1)
            third.send(get("/v1/models"))  # by now it is not one too many any more
            assert (await third.read_reply()).status == 200


async def test_far_beyond_the_bound_connections_are_closed_at_once():
    async with (
        running(gateway={"max_connections": 1}) as system,
        contextlib.AsyncExitStack() as stack,
    ):
        clients = [await stack.enter_async_context(connected(system)) for _ in range(30)]
        await system.until(lambda: len(system.gateway.app.connections) == 1 + 16)
        clients[0].send(get("/v1/models"))
        assert (await clients[0].read_reply()).status == 200
        assert await clients[-1].is_closed()


async def test_one_client_cannot_take_all_connections():
    limits = {"max_connections_per_client": 2}
    async with running(gateway=limits) as system, contextlib.AsyncExitStack() as stack:
        mine = [await stack.enter_async_context(connected(system)) for _ in range(3)]
        mine[2].send(get("/v1/models"))
        assert await _refused(mine[2]) == 429
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", system.gateway.config.gateway.port, local_addr=("127.0.0.2", 0)
        )
        writer.write(get("/v1/models"))
        assert (await RawClient(reader, writer).read_reply()).status == 200
        writer.close()


def test_connections_are_counted_by_ipv4_address_and_ipv6_network():
    counted = Connections(max_connections=1000, max_per_client=1)

    def is_refused(address: str) -> bool:
        connection = object()
        counted.add(connection, (address, 1))
        return counted.refusal(connection) is not None

    assert not is_refused("192.0.2.1")
    assert not is_refused("192.0.2.2")
    assert is_refused("::ffff:192.0.2.1")  # the first, seen by a socket for both
    assert not is_refused("2001:db8:0:1::1")
    assert is_refused("2001:db8:0:1:ffff::2")
    assert not is_refused("2001:db8:0:2::1")
    assert not is_refused("fe80::1%eth0")


def test_connections_leave_descriptors_for_engines_providers_and_files():
    for num_descriptors in (1_024, 20_000, 1_048_576):
        for num_each in (1, 2):
            fitting = fitting_connections(num_descriptors, num_each)
            assert fitting * (num_each + 0.25) <= num_descriptors - 512
            assert fitting >= num_descriptors / 5


async def test_any_number_of_requests_in_a_row_are_refused_in_their_order():
    """Each answer lets the next begin: not within the call that gave it."""
    async with running(num_engines=1) as system, connected(system) as client:
        first = post(system.chat(max_tokens=1))
        client.send(first + post(b"{") * 2000)
        assert (await client.read_reply()).status == 200
        raw = b""
        async with asyncio.timeout(20.0):
            while raw.count(b"HTTP/1.1 400 ") < 2000:
                raw += await client.reader.read(2**16)
        client.send(get("/v1/models"))
        assert (await client.read_reply()).status == 200


async def test_a_stream_takes_no_task():
    """A task's every step would cost as much as the rest of a token's way."""
    async with running(num_engines=1) as system, connected(system) as client:
        [engine] = system.engines
        engine.closes_at = 2
        client.send(post(system.chat(max_tokens=3)))
        await system.until(lambda: engine.num_steps == 2)
        names = [task.get_coro().__qualname__ for task in asyncio.all_tasks()]
        ours = [name for name in names if name.startswith(("RequestResponseCycle.", "Call."))]
        assert not ours
        engine.gate.set()
        assert (await client.read_reply()).body.count(b"data: {}") == 3
