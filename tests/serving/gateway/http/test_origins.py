"""Which web pages may call, and what a browser is told."""

import pytest

from serving.config import ConfigError, parse
from serving.gateway.tenants.keys import KeysFile
from tests.serving.gateway.http.raw_client import connected, get, post
from tests.support.running_gateway import CHAT, running

POLICY = {"policy": "round_robin"}
JSON = "content-type: application/json"
PAGE = "https://chat.example.com"


async def _status(system, request: bytes) -> int:
    async with connected(system) as client:
        client.send(request)
        return (await client.read_reply()).status


def _asking(host: str, *headers: str) -> list[bytes]:
    """Everything that is for our own clients, asked under this name."""
    changed = [post(POLICY, JSON, *headers, path="/headway/policy")]
    changed.append(post(b"", *headers, path="/headway/reload"))
    seen = [get(path, *headers) for path in ("/headway/state", "/headway/usage", "/metrics")]
    return [
        request.replace(b"host: localhost", f"host: {host}".encode()) for request in changed + seen
    ]


@pytest.mark.parametrize(
    ("host", "headers"),
    [
        ("evil.example", ()),  # a name that points here
        ("evil.example:8000", ("origin: http://evil.example:8000",)),
        ("127.0.0.1.evil.example", ()),
        ("localhost@evil.example", ()),
        ("localhost", ("origin: https://evil.example",)),
        ("127.0.0.1:8000", ("origin: null",)),
        ("localhost", ("origin: https://localhost.evil.example",)),
    ],
)
async def test_without_keys_no_foreign_page_or_name_reaches_what_is_ours(host, headers):
    async with running(num_engines=1) as system:
        for request in _asking(host, *headers):
            assert await _status(system, request) == 403
        assert system.gateway.state().policy == "headway"


@pytest.mark.parametrize(
    ("host", "headers"),
    [
        ("localhost:9000", ()),  # through a tunnel
        ("127.0.0.1", ()),
        ("[::1]:8000", ()),
        ("LOCALHOST", ()),
        ("127.0.0.1:8000", ("origin: http://127.0.0.1:8000",)),
        ("127.0.0.1:8000", ("origin: http://localhost:3000",)),
    ],
)
async def test_our_own_clients_do(host, headers):
    async with running(num_engines=1) as system:
        for request in _asking(host, *headers):
            assert await _status(system, request) == 200
        assert system.gateway.state().policy == "round_robin"


async def test_a_client_of_http_1_0_has_no_host():
    async with running(num_engines=1) as system:
        assert await _status(system, b"GET /headway/state HTTP/1.0\r\n\r\n") == 200


async def test_names_can_be_allowed():
    gateway = {"allowed_hosts": ["Gateway.lan"], "cors_origins": [PAGE]}
    async with running(num_engines=1, gateway=gateway) as system:
        for request in _asking("gateway.lan:80") + _asking("localhost", f"origin: {PAGE}"):
            assert await _status(system, request) == 200
        for request in _asking("other.lan"):
            assert await _status(system, request) == 403


async def test_models_are_for_any_name():
    """As plain vLLM serves them; a proxy on this machine need not be told."""
    async with running(num_engines=1) as system:
        for request in (get("/v1/models"), get("/health"), post(system.chat())):
            request = request.replace(b"host: localhost", b"host: llm.example.com")
            assert await _status(system, request) == 200


async def test_with_keys_a_foreign_page_has_none(tmp_path):
    path = tmp_path / "keys.json"
    with KeysFile(path) as file:
        file.save()
    async with running(num_engines=1, auth={"keys_file": str(path)}) as system:
        for request in _asking("evil.example", "origin: https://evil.example"):
            assert await _status(system, request) == 401


# --- CORS -----------------------------------------------------------------------------


def _preflight(path: str = CHAT) -> bytes:
    return get(
        path,
        f"origin: {PAGE}",
        "access-control-request-method: POST",
        "access-control-request-headers: authorization,content-type,x-headway-class",
        method="OPTIONS",
    )


async def test_no_page_may_call_by_default():
    async with running(num_engines=1) as system, connected(system) as client:
        client.send(_preflight())
        assert (await client.read_reply()).status == 405
        reply = await system.client.post(CHAT, json=system.chat(), headers={"origin": PAGE})
        assert not [name for name in reply.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origins", [[PAGE], ["*"], ["https://other.example", PAGE]])
async def test_a_page_that_is_named_may_call(origins):
    async with running(num_engines=1, gateway={"cors_origins": origins}) as system:
        async with connected(system) as client:
            client.send(_preflight())
            reply = await client.read_reply()
        assert reply.status == 200
        allowed = "*" if origins == ["*"] else PAGE
        assert reply.headers["access-control-allow-origin"] == allowed
        assert "POST" in reply.headers["access-control-allow-methods"]
        assert "authorization" in reply.headers["access-control-allow-headers"]
        client = system.client
        for reply in (
            await client.post(CHAT, json=system.chat(), headers={"origin": PAGE}),
            await client.post(CHAT, content=b"{", headers={"origin": PAGE}),
            await client.get("/v1/models", headers={"origin": PAGE}),
            await client.get("/v1/nothing", headers={"origin": PAGE}),
        ):
            assert reply.headers["access-control-allow-origin"] == allowed
            assert "x-request-id" in reply.headers["access-control-expose-headers"]
            assert reply.headers["vary"].lower() == "origin"


async def test_another_page_may_not():
    async with running(num_engines=1, gateway={"cors_origins": ["https://ours.example"]}) as system:
        async with connected(system) as client:
            client.send(_preflight())
            reply = await client.read_reply()
            assert reply.status == 400
            assert "access-control-allow-origin" not in reply.headers
        reply = await system.client.get("/v1/models", headers={"origin": PAGE})
        assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize("origin", ["example.com", "https://example.com/", "https://", "ftp:/x"])
def test_an_origin_that_no_browser_sends_is_refused_at_the_start(origin):
    with pytest.raises(ConfigError, match=r"gateway\.cors_origins"):
        parse({"gateway": {"cors_origins": [origin]}})
