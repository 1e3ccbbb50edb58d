"""Gateways ask each other: who is let in, and what becomes of one that is dead or hung."""

import asyncio
import contextlib
import time
from types import SimpleNamespace

import pytest

from serving.gateway.observe.peers import link as module
from serving.gateway.observe.peers.frames import Ask
from serving.gateway.observe.peers.link import NoAnswer, PeerLink
from serving.gateway.observe.peers.peers import Peers
from serving.stream.frames import Hello, encode

TIMEOUT_S = 0.2


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "ANSWER_TIMEOUT_S", TIMEOUT_S)


class Gateway:
    """What answers as a gateway would, when it may."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.heard: list[tuple[str, bytes]] = []
        self.reached = 0
        self.peers = Peers(name, self.answer, self.on_reached)

    async def answer(self, what: str, body: bytes) -> bytes:
        await self.may_answer.wait()
        self.heard.append((what, body))
        if what == "bad":
            raise ValueError("that is nonsense")
        return f"{self.name} on {what}".encode()

    async def on_reached(self, link: PeerLink) -> None:
        self.reached += 1
        await link.ask("hello")


@contextlib.asynccontextmanager
async def gateways(*names: str, tls: bool = False):
    made = [Gateway(name) for name in names]
    for each in made:
        await each.peers.listen("127.0.0.1", tls=tls)
    members = {each.name: each.peers.metadata for each in made}
    for each in made:
        each.peers.set_members(members)
        await each.peers.met(5.0)
    try:
        yield made
    finally:
        for each in made:
            each.peers.close()


async def until(condition) -> None:
    async with asyncio.timeout(5.0):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("tls", [False, True])
async def test_each_asks_all_others(tls):
    async with gateways("a", "b", "c", tls=tls) as (a, b, c):
        assert [each.reached for each in (a, b, c)] == [2, 2, 2]
        said, missing = await a.peers.ask("state", b"x")
        assert said == {"b": b"b on state", "c": b"c on state"}
        assert missing == {}
        assert b.heard[-1] == ("state", b"x")
        assert await c.peers.ask_one("a", "usage") == b"a on usage"


async def test_what_cannot_be_answered_is_said():
    async with gateways("a", "b") as (a, _):
        said, missing = await a.peers.ask("bad")
        assert (said, missing) == ({}, {"b": "ValueError: that is nonsense"})
        assert (await a.peers.ask("state")).said == {"b": b"b on state"}


async def test_one_that_nobody_waits_for_any_more_is_late_by_any_clock(monkeypatch):
    async with gateways("a", "b") as (a, b):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 100.0))
        b.may_answer.clear()
        for words in ("it has not answered within 0.2 s", "it has not answered for 0.2 s"):
            with pytest.raises(NoAnswer, match=words):
                await a.peers.ask_one("b", "state")


async def test_one_that_hangs_costs_the_time_of_an_answer_once():
    async with gateways("a", "b", "c") as (a, b, _):
        b.may_answer.clear()
        began_s = time.monotonic()
        said, missing = await a.peers.ask("state")
        assert time.monotonic() - began_s < TIMEOUT_S + 0.5
        assert said == {"c": b"c on state"}
        assert missing["b"].startswith("it has not answered within")
        for _ in range(20):
            began_s = time.monotonic()
            said, missing = await a.peers.ask("state")
            assert time.monotonic() - began_s < TIMEOUT_S  # who waits for b takes that long
            assert (list(said), list(missing)) == (["c"], ["b"])
        # What it has to know it hears when it can; questions it was spared.
        _, missing = await a.peers.ask("orders", b"drain", insists=True)
        assert "hears of this when it can" in missing["b"]
        b.may_answer.set()
        await until(lambda: ("orders", b"drain") in b.heard)
        assert [what for what, _ in b.heard].count("state") == 1
        await until(lambda: not a.peers._links["b"].silent_s)
        assert set((await a.peers.ask("state")).said) == {"b", "c"}


async def test_one_that_ends_is_named_and_found_again():
    async with gateways("a", "b") as (a, b):
        b.may_answer.clear()
        asking = asyncio.create_task(a.peers.ask("state"))
        await asyncio.sleep(0)
        b.peers.close()
        said, missing = await asking
        assert (said, missing) == ({}, {"b": "it has ended, or its connection has"})
        said, missing = await a.peers.ask("state")
        assert (said, missing) == ({}, {"b": "there is no connection to it"})
        again = Gateway("b")
        await again.peers.listen("127.0.0.1")
        a.peers.set_members({"a": a.peers.metadata, "b": again.peers.metadata})
        await until(lambda: ("hello", b"") in again.heard)
        assert (await a.peers.ask("state")).said == {"b": b"b on state"}
        a.peers.set_members({"a": a.peers.metadata})
        assert await a.peers.ask("state") == ({}, {})
        again.peers.close()


async def test_who_does_not_know_the_secret_is_let_in_nowhere():
    async with gateways("a") as (a,):
        host, port = a.peers.metadata["host"], a.peers.metadata["port"]
        for frames in (
            [Hello("wrong"), Ask(1, "state")],
            [Ask(1, "state")],
            [Hello(""), Ask(1, "state")],
        ):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(encode(frames))
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
        assert a.heard == []
        link = await PeerLink.connect(a.peers.metadata | {"secret": "wrong"}, lambda link: None)
        with pytest.raises(NoAnswer):
            await link.ask("state")
        assert a.heard == []


async def test_nobody_waits_for_those_whom_nobody_names():
    lonely = Gateway("a")
    began_s = time.monotonic()
    await lonely.peers.met(0.1)
    assert 0.05 < time.monotonic() - began_s < 2
    lonely.peers.set_members({"a": {}, "old": {}})  # of a version that had no peers
    await lonely.peers.met(5.0)
    assert await lonely.peers.ask("state") == ({}, {})
