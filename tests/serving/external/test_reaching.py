"""Which servers can be reached, under which names and keys, and what is said of the others."""

import asyncio
import logging
import ssl

import pytest

from serving.config import ConfigError, parse
from tests.serving.external.before_servers import SAID, ask, attached, content, infos
from tests.serving.external.fake_vllm import FakeVllm, listening
from tests.serving.gateway.http.test_listener import Certificate
from tests.support.running_gateway import running


async def test_a_model_of_another_name():
    server = FakeVllm(model="/models/llama")
    async with attached(server, external={"model": "llama"}) as system:
        assert content((await ask(system, model="llama")).text) == SAID
        assert server.bodies[-1]["model"] == "/models/llama"
        assert (await ask(system, model="/models/llama")).status_code == 404
        names = [card["id"] for card in (await system.client.get("/v1/models")).json()["data"]]
        assert names == ["llama"]


async def test_servers_of_different_models():
    one, two = FakeVllm(model="a"), FakeVllm(model="b")
    async with attached(one, two) as system:
        assert content((await ask(system, model="b")).text) == SAID
        assert (len(one.bodies), len(two.bodies)) == (0, 1)


async def test_keys_are_sent_and_never_told(monkeypatch, caplog):
    monkeypatch.setenv("THEIR_KEY", "sk-very-secret")
    server = FakeVllm(key="sk-very-secret")
    async with attached(server, external={"key_env": "THEIR_KEY"}) as system:
        assert content((await ask(system)).text) == SAID
        state = (await system.client.get("/headway/state")).text
        server.key = "sk-another"
        reply = await ask(system)
        assert reply.status_code == 502
        told = state + reply.text + caplog.text
        assert "its key is not accepted" in caplog.text
        assert "very-secret" not in told
    assert "very-secret" not in repr(
        parse({"external": [{"url": "http://a", "key": "very-secret"}]})
    )


async def test_keys_that_cannot_be_read(monkeypatch):
    monkeypatch.delenv("THEIR_KEY", raising=False)
    with pytest.raises(ConfigError, match="key_env THEIR_KEY"):
        async with running(0, external=[{"url": "http://a:1", "key_env": "THEIR_KEY"}]):
            pass
    with pytest.raises(ConfigError, match="only one"):
        parse({"external": [{"url": "http://a", "key": "x", "key_env": "Y"}]})
    with pytest.raises(ConfigError, match="once"):
        parse({"external": [{"url": "http://a/v1"}, {"url": "http://a/"}]})


@pytest.mark.parametrize(
    ("server", "external", "words"),
    [
        (FakeVllm(key="k"), {}, "answers 401: set external.key"),
        (FakeVllm(), {"url": "http://127.0.0.1:1"}, "no connection"),
        (FakeVllm(), {"url": "{url}/somewhere"}, "answers 404: is external.url right?"),
        (FakeVllm(), {"url": "https://{host}"}, "TLS"),
        (FakeVllm(), {"url": "http://no-such-host.invalid"}, "its name is not known"),
    ],
)
async def test_what_cannot_be_used_is_said_once_and_others_go_on(server, external, words, caplog):
    good = FakeVllm()
    async with listening(server), listening(good):
        host = server.url.removeprefix("http://")
        bad = {"url": server.url, **external}
        bad["url"] = bad["url"].format(url=server.url, host=host)
        with caplog.at_level(logging.WARNING, "serving"):
            async with running(0, external=[bad, {"url": good.url}]) as system:
                await system.until(lambda: words in caplog.text)
                await system.until(lambda: len(infos(system)) == 1)
                assert content((await ask(system)).text) == SAID
                await asyncio.sleep(0.8)  # it is tried again meanwhile
        assert caplog.text.count("cannot be used") == 1


async def test_a_server_that_is_not_vllm(caplog):
    """It tells neither metrics nor ids, and is not asked for what it may not know."""
    server = FakeVllm(owned_by="someone", has_metrics=False, tells_ids=False)
    async with attached(server) as system:
        assert content((await ask(system)).text) == SAID
        assert "return_token_ids" not in server.bodies[-1]
        assert "tells no metrics" in caplog.text
        name = server.url.removeprefix("http://")
        await system.until(lambda: system.gateway.state().replicas[name].snapshot is not None)
        assert infos(system)[name].engine == "OpenAI-compatible server, external"


async def test_metrics_that_are_not_asked_for_by_name():
    server = FakeVllm(knows_names=False, num_others=2)
    async with attached(server) as system:
        name = server.url.removeprefix("http://")
        await system.until(
            lambda: (
                (each := system.gateway.state().replicas[name].snapshot) is not None
                and each.num_inflight_reqs == 2
            )
        )


async def test_tls(tmp_path, caplog):
    certificate = Certificate(tmp_path, "server")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate.cert, certificate.key)
    server = FakeVllm()
    async with listening(server, ssl_context=context):
        trusting = [{"url": server.url, "ca_file": str(certificate.cert)}]
        async with running(0, external=trusting) as system:
            await system.until(lambda: bool(infos(system)))
            assert content((await ask(system)).text) == SAID
        async with running(0, external=[{"url": server.url}]) as system:
            await system.until(lambda: "its certificate is not trusted" in caplog.text)
            assert not infos(system)
