"""What gateways and engines say to each other across a network is for nobody else."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest

from serving.stream.client import StreamClient
from serving.stream.frames import Submit
from serving.stream.server import StreamServer
from serving.stream.tls import Authority, make_authority, make_certificate, make_identity
from tests.serving.stream.test_stream import WINDOW_BYTES, Recorder
from tests.support.fakes import FakeEngine

PROMPT = b"a prompt that is nobody's business"


def submit() -> Submit:
    body = b'{"max_tokens": 3, "prompt": "%b"}' % PROMPT
    return Submit(1, "id1", 5, 0, 0, "POST", "/v1/completions", [], body)


@contextlib.asynccontextmanager
async def listening(*, tls: bool, clients: str = "") -> AsyncIterator[tuple[StreamServer, dict]]:
    """A server, and what Ray would tell of it."""
    server = StreamServer(FakeEngine(), WINDOW_BYTES)
    host, port = await server.listen("127.0.0.1", tls=tls, clients=clients)
    member = {"host": host, "port": port, "secret": server.secret}
    try:
        yield server, {**member, "certificate": server.certificate}
    finally:
        server.close()


@contextlib.asynccontextmanager
async def tapped(member: dict) -> AsyncIterator[tuple[dict, bytearray]]:
    """The same member behind a line on which somebody listens."""
    heard = bytearray()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            heard.extend(data)
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection(member["host"], member["port"])
        await asyncio.gather(pass_on(reader, ours), pass_on(theirs, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield {**member, "port": server.sockets[0].getsockname()[1]}, heard
    finally:
        server.close()


@pytest.mark.parametrize("tls", [True, False])
async def test_who_listens_on_the_line_hears_nothing(tls):
    async with listening(tls=tls) as (server, member), tapped(member) as (told, heard):
        recorder = Recorder()
        client = await StreamClient.connect("r0", told, recorder)
        client.post(submit())
        await recorder.until(recorder.ends)
        assert recorder.num_bytes(1) == 3 * len(b"data: {}\n\n") + len(b"data: [DONE]\n\n")
        secrets = (server.secret.encode(), PROMPT, b"data: {}")
        assert [secret in heard for secret in secrets] == [not tls] * 3
        client.close()
        await recorder.until(lambda: recorder.lost)


async def test_whoever_has_another_certificate_learns_no_secret():
    """Who answers at the engine's address has to be the engine."""
    other, _ = make_certificate()
    async with listening(tls=True) as (server, member), tapped(member) as (told, heard):
        with pytest.raises(OSError, match="certificate verify failed"):
            await StreamClient.connect("r0", {**told, "certificate": other}, Recorder())
        assert server.secret.encode() not in heard


async def test_an_engine_that_should_encrypt_and_does_not_learns_no_secret():
    certificate, _ = make_certificate()
    async with listening(tls=False) as (server, member), tapped(member) as (told, heard):
        with pytest.raises(OSError):  # noqa: PT011  # the kind depends on the event loop
            await StreamClient.connect("r0", {**told, "certificate": certificate}, Recorder())
        assert server.secret.encode() not in heard


async def is_welcome(member: dict, authority: Authority | None) -> bool:
    """Whether an engine talks to a gateway of this authority, which knows its secret."""
    identity = None if authority is None else make_identity(authority)
    recorder = Recorder()
    try:
        client = await StreamClient.connect("r0", {**member, "identity": identity}, recorder)
    except OSError:
        return False
    await recorder.until(lambda: recorder.info or recorder.lost)
    client.close()
    return recorder.info is not None


async def test_only_gateways_of_the_application_are_heard_though_others_know_the_secret():
    """In TLS 1.3 a client hears only after the handshake that it was refused."""
    ours, theirs = make_authority(), make_authority()
    async with listening(tls=True, clients=ours.certificate) as (server, member):
        assert await is_welcome(member, ours)
        assert not await is_welcome(member, theirs)
        assert not await is_welcome(member, None)
        assert await is_welcome(member, ours)
        # Who shows what an engine shows, which all gateways know, is no gateway.
        assert not await is_welcome(member, theirs._replace(certificate=member["certificate"]))
        assert not server.strangers


async def test_who_does_not_encrypt_is_not_heard():
    async with listening(tls=True) as (server, member):
        reader, writer = await asyncio.open_connection(member["host"], member["port"])
        writer.write(b"\x00\x00\x00\x10" + b"x" * 16)
        async with asyncio.timeout(7):
            while await reader.read(1000):
                pass
        writer.close()
        assert not server._connections


async def test_tokens_leave_at_once():
    """Without it the kernel would hold small frames back for 40 ms."""
    async with listening(tls=True) as (_, member):
        recorder = Recorder()
        client = await StreamClient.connect("r0", member, recorder)
        await recorder.until(lambda: recorder.info)
        own = client._transport.get_extra_info("socket")
        assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        client.close()
