"""What every request meets, whatever answers it: paths, methods, ids, errors nobody expected."""

import asyncio
import gzip
import json
import logging
import re

import pytest

from tests.serving.gateway.http.raw_client import connected, get, post
from tests.support.running_gateway import CHAT, running

GETS = ("/v1/models", "/health", "/health/live", "/health/ready", "/metrics", "/headway/state")


async def test_every_reply_bears_the_id_of_its_request():
    """By it the SDK's `_request_id`, logs and support find each other."""
    async with running(num_engines=1) as system:
        client, given = system.client, {"x-request-id": "mine-1"}
        asked = [
            lambda **kwargs: client.post(CHAT, json=system.chat(), **kwargs),
            lambda **kwargs: client.post(CHAT, json=system.chat(model="none"), **kwargs),
            lambda **kwargs: client.post(CHAT, content=b"{", **kwargs),
            lambda **kwargs: client.get(CHAT, **kwargs),
            lambda **kwargs: client.get("/nothing", **kwargs),
            lambda **kwargs: client.get("/v1/models", **kwargs),
            lambda **kwargs: client.post("/headway/policy", json={}, **kwargs),
        ]
        for ask in asked:
            assert (await ask(headers=given)).headers["x-request-id"] == "mine-1"
            replies = [await ask() for _ in range(2)]
            ids = {reply.headers.get_list("x-request-id")[0] for reply in replies}
            assert len(ids) == 2
            assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)
            assert all(len(reply.headers.get_list("x-request-id")) == 1 for reply in replies)


async def test_any_id_is_taken_but_none():
    async with running(num_engines=1) as system:
        for given in (b"a b", b"x" * 5_000, b"<script>", "é".encode(), b"\xe9"):
            reply = await system.client.get("/v1/models", headers={b"x-request-id": given})
            assert dict(reply.headers.raw)[b"x-request-id"] == given
        reply = await system.client.get("/v1/models", headers={"x-request-id": ""})
        assert re.fullmatch("[0-9a-f]{32}", reply.headers["x-request-id"])


@pytest.mark.parametrize("path", GETS)
async def test_head_is_get_without_the_body(path):
    async with running(num_engines=1) as system, connected(system) as client:
        got = await system.client.get(path)
        assert got.status_code == 200
        client.send(get(path, "connection: close", method="HEAD"))
        head, separator, body = (await client.reader.read()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert separator
        assert body == b""
        assert b"content-type: " + got.headers["content-type"].encode() in head


async def test_a_method_that_a_path_does_not_take_is_told_which_it_takes():
    async with running(num_engines=1) as system:
        for path, allow in ((CHAT, "POST"), ("/v1/models", "GET, HEAD")):
            for method in ("PUT", "DELETE", "OPTIONS"):
                reply = await system.client.request(method, path)
                assert reply.status_code == 405
                assert reply.headers["allow"] == allow
                error = reply.json()["error"]
                assert (error["type"], error["code"]) == ("Method Not Allowed", 405)


async def test_a_slash_at_the_end_makes_no_difference():
    """A redirect would lose the body of what is posted, or its key."""
    async with running(num_engines=1) as system:
        for path in GETS:
            assert (await system.client.get(f"{path}/")).status_code == 200
        reply = await system.client.post(f"{CHAT}/", json=system.chat(max_tokens=1))
        assert reply.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    "path",
    [
        "/headway%2fstate",
        "/headway%2Fstate",
        "/%68eadway/state",
        "/headway/stat%65",
        "//headway/state",
        "/./headway/state",
        "/v1/../headway/state",
        "/v1/models/..%2f..%2fheadway/state",
        "/v1/models/%2e%2e/%2e%2e/headway/state",
        "/v1%2fmodels",
        "/HEADWAY/state",
    ],
)
async def test_a_guarded_path_has_no_second_name(path):
    """A proxy that keeps `/headway/` from the world compares paths as they are written."""
    async with running(num_engines=1) as system, connected(system) as client:
        client.send(get(path))
        reply = await client.read_reply()
        assert reply.status == 404
        assert reply.error["type"] == "NotFoundError"


@pytest.mark.parametrize("root", ["/api", "/api/"])
async def test_below_a_root_all_is_as_without(root):
    """As behind Ray Serve's proxy, with a route prefix."""
    async with running(num_engines=1) as system:
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/api/v1/models",
            "raw_path": b"/api/v1/models",
            "root_path": root,
            "query_string": b"",
            "headers": [],
        }
        sent = []

        async def send(message):
            sent.append(message)

        await system.gateway.app(scope, None, send)
        assert sent[0]["status"] == 200


async def test_behind_serve_an_id_is_not_told_twice():
    """Its server tells it already; two of the same name would be read as one, "a, a"."""
    async with running(num_engines=1, gateway={"front": "haproxy"}) as system:
        for path in ("/v1/models", "/nothing", "/health"):
            assert "x-request-id" not in (await system.client.get(path)).headers
        reply = await system.client.post(CHAT, json=system.chat())
        assert "x-request-id" not in reply.headers


async def test_the_root_leads_to_the_page():
    async with running(num_engines=0) as system:
        for path, there in (("/", "/headway/"), ("/headway", "/headway/")):
            reply = await system.client.get(path)
            assert (reply.status_code, reply.next_request.url.path) == (307, there)
        page = await system.client.get("/headway/")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert page.text.startswith("<!doctype html>")


async def test_where_nothing_is_served_an_error_says_so():
    async with running(num_engines=1) as system:
        for path in ("/v1", "/v1/nothing", "/headway/page/nothing", "/docs", "/openapi.json"):
            reply = await system.client.get(path)
            assert reply.status_code == 404
            error = reply.json()["error"]
            assert (error["type"], error["param"], error["code"]) == ("NotFoundError", None, 404)


# --- exceptions ----------------------------------------------------------------


class Broken(Exception):
    pass


def _break(system, monkeypatch, at: str) -> None:
    """Have something raise that is not expected to."""
    gateway = system.gateway
    owner, name = {
        "the parser": (gateway.request_parser, "parse"),
        "the driver": (gateway.driver, "acknowledge_bytes"),
        "a small endpoint": (gateway.router, "state"),
    }[at]

    def fail(*args, **kwargs):
        raise Broken("secret")

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("at", ["the parser", "a small endpoint"])
async def test_an_exception_is_a_json_500_and_logged_once(at, monkeypatch, caplog):
    async with running(num_engines=1) as system:
        _break(system, monkeypatch, at)
        headers = {"x-request-id": "mine-7"}
        if at == "the parser":
            reply = await system.client.post(CHAT, json=system.chat(), headers=headers)
        else:
            reply = await system.client.get("/headway/state", headers=headers)
        assert reply.status_code == 500
        error = reply.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("InternalServerError", None, 500)
        assert "mine-7" in error["message"]
        assert "secret" not in reply.text
        assert reply.headers["x-request-id"] == "mine-7"
        [record] = [each for each in caplog.records if each.levelno >= logging.ERROR]
        assert "mine-7" in record.getMessage()
        assert record.exc_info[0] is Broken
        monkeypatch.undo()
        system.assert_empty()
        assert (await system.client.post(CHAT, json=system.chat())).status_code == 200


async def test_an_exception_in_a_stream_breaks_it_off_and_leaves_nothing(monkeypatch, caplog):
    async with running(num_engines=1) as system, connected(system) as client:
        _break(system, monkeypatch, "the driver")
        client.send(post(system.chat(max_tokens=1000), "x-request-id: mine-7"))
        raw = await client.reader.read()
        assert raw.startswith(b"HTTP/1.1 200 ")
        assert not raw.endswith(b"0\r\n\r\n")  # visibly not whole
        [record] = [each for each in caplog.records if each.levelno >= logging.ERROR]
        assert record.exc_info[0] is Broken
        assert "request mine-7" in record.exc_info[1].__notes__
        await system.until(lambda: system.num_engine_streams == 0)
        await system.until(lambda: not system.gateway.driver.exchanges)
        monkeypatch.undo()
        system.assert_empty()


@pytest.mark.parametrize("depth", [500, 2_000, 100_000])
async def test_deeply_nested_json_is_the_clients_fault(depth):
    async with running(num_engines=1) as system:
        nested = b"[" * depth + b"]" * depth
        for body in (nested, b'{"model":"fake-model","messages":%b}' % nested):
            reply = await system.client.post(CHAT, content=body)
            assert reply.status_code == 400 or depth == 500
            assert reply.status_code < 500
            if reply.status_code == 400:
                assert reply.json()["error"]["code"] == 400
        reply = await system.client.post(
            "/headway/policy", content=nested, headers={"content-type": "application/json"}
        )
        assert reply.status_code == (400 if depth < 30_000 else 413)
        system.assert_empty()


@pytest.mark.parametrize("number", ["9" * 309, "9" * 5000, "1e400", "-" + "9" * 309])
@pytest.mark.parametrize("field", ["n", "max_tokens", "top_k", "seed"])
async def test_a_number_beyond_sense_is_the_clients_fault_and_leaves_nothing(field, number):
    async with running(num_engines=1) as system:
        body = json.dumps(system.chat())[:-1] + f', "{field}": {number}}}'
        for _ in range(3):
            reply = await system.client.post(CHAT, content=body)
            assert reply.status_code == 400
            assert reply.json()["error"]["code"] == 400
        assert not system.gateway.driver.exchanges
        system.assert_empty()


# --- bodies and streams ------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "identity, gzip"])
async def test_a_compressed_body_is_refused_by_its_name(encoding):
    async with running(num_engines=1) as system:
        body = gzip.compress(json.dumps(system.chat()).encode())
        headers = {"content-encoding": encoding}
        reply = await system.client.post(CHAT, content=body, headers=headers)
        assert reply.status_code == 415
        assert encoding in reply.json()["error"]["message"]
        assert reply.headers["accept-encoding"] == "identity"
        plain = await system.client.post(
            CHAT, json=system.chat(), headers={"content-encoding": "identity"}
        )
        assert plain.status_code == 200


async def test_no_proxy_holds_a_stream_back():
    async with running(num_engines=1) as system:
        reply = await system.client.post(CHAT, json=system.chat())
        assert reply.headers["cache-control"] == "no-cache"
        assert reply.headers["x-accel-buffering"] == "no"
        system.engines[0].headers = [(b"content-type", b"application/json")]
        reply = await system.client.post(CHAT, json=system.chat())
        assert "x-accel-buffering" not in reply.headers


async def test_the_policys_body_is_bounded_and_json():
    async with running(num_engines=1) as system:
        client = system.client
        as_json = {"content-type": "application/json"}
        large = b'{"policy": "' + b"x" * 65_536 + b'"}'
        for content in (large, _pieces(large)):
            reply = await client.post("/headway/policy", content=content, headers=as_json)
            assert reply.status_code == 413
        for content_type in ("text/plain", "application/x-www-form-urlencoded", None):
            headers = {"content-type": content_type} if content_type else {}
            for path in ("/headway/policy", "/headway/reload"):
                body = b'{"policy": "round_robin"}'
                reply = await client.post(path, content=body, headers=headers)
                assert reply.status_code == 415
                assert "application/json" in reply.json()["error"]["message"]
        assert system.gateway.state().policy == "headway"
        headers = {"content-type": "Application/JSON; charset=utf-8"}
        reply = await client.post("/headway/policy", content=body, headers=headers)
        assert reply.status_code == 200
        assert (await client.post("/headway/reload")).status_code == 200


async def _pieces(content: bytes):
    for start in range(0, len(content), 10_000):
        yield content[start : start + 10_000]


async def test_who_leaves_within_a_small_body_is_not_logged(caplog):
    async with running(num_engines=1) as system:
        async with connected(system) as client:
            client.send(
                post(b"x" * 100, "content-type: application/json", path="/headway/policy")[:-9]
            )
            await asyncio.sleep(0.05)
        await system.until(lambda: not len(system.gateway.app.connections))
        await asyncio.sleep(0.05)
        assert not [each for each in caplog.records if each.levelno >= logging.ERROR]
