"""The same replies where another server has the connection, as behind Ray Serve's proxy."""

import asyncio
import contextlib
import json
from typing import Any

import pytest

from tests.support.running_gateway import CHAT, System, running

SERVE: dict[str, Any] = {"gateway": {"front": "haproxy"}}


class Browser:
    """A client, and the server that it is connected to."""

    def __init__(self, system: System, *body: bytes, **headers: str) -> None:
        self._system = system
        self._parts = list(body)
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        self._left = asyncio.Event()
        self.reads = asyncio.Event()  # what it is sent
        self.reads.set()
        self.messages: list[dict[str, Any]] = []

    async def ask(self) -> None:
        scope = {
            "type": "http",
            "method": "POST",
            "path": CHAT,
            "raw_path": CHAT.encode(),
            "query_string": b"",
            "headers": self._headers,
        }
        await self._system.gateway.app(scope, self._receive, self._send)

    def leave(self) -> None:
        self._left.set()

    async def _receive(self) -> dict[str, Any]:
        if self._parts:
            body = self._parts.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(self._parts)}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self.reads.wait()
        self.messages.append(message)

    @property
    def status(self) -> int:
        return self.messages[0]["status"]

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.messages[1:])


def chat(system: System, **fields: Any) -> bytes:
    return json.dumps(system.chat(**fields)).encode()


async def test_a_stream_is_whole_however_the_body_comes():
    async with running(num_engines=1, **SERVE) as system:
        body = chat(system, max_tokens=3)
        for parts in ([body], [body[:9], body[9:]], [body, b""]):
            browser = Browser(system, *parts)
            await browser.ask()
            assert browser.status == 200
            assert browser.body == b"data: {}\n\n" * 3 + b"data: [DONE]\n\n"
            assert browser.messages[-1]["more_body"] is False
        system.assert_empty()


async def test_it_is_refused_as_elsewhere():
    limits = SERVE["gateway"] | {"max_body_bytes": 1024}
    async with running(num_engines=1, gateway=limits) as system:
        long = [b" " * 600, b" " * 600]
        for browser, status in (
            (Browser(system, b"{"), 400),
            (Browser(system, *long), 413),
            (Browser(system, b"{}", **{"content-encoding": "gzip"}), 415),
            (Browser(system, *[b" " * 600] * 20, b"never"), 413),  # before its end
        ):
            await browser.ask()
            assert browser.status == status
            assert json.loads(browser.body)["error"]
        assert system.gateway.body_reader.num_bytes == 0


async def test_who_leaves_frees_the_engine():
    async with running(num_engines=1, **SERVE) as system:
        [engine] = system.engines
        engine.closes_at = 2
        browser = Browser(system, chat(system, max_tokens=9))
        asking = asyncio.create_task(browser.ask())
        await system.until(lambda: len(browser.messages) >= 2)
        browser.leave()
        await asking
        await system.until(lambda: engine.num_cancelled == 1)
        assert system.outcomes["reneged"] == 1
        system.assert_empty()


async def test_who_leaves_within_the_body_asks_nothing():
    async with running(num_engines=1, **SERVE) as system:
        browser = Browser(system)
        browser.leave()
        await browser.ask()
        assert not browser.messages
        assert system.gateway.body_reader.num_bytes == 0


async def test_a_server_that_is_stopped_frees_the_engine():
    async with running(num_engines=1, **SERVE) as system:
        [engine] = system.engines
        engine.gate.clear()
        asking = asyncio.create_task(Browser(system, chat(system)).ask())
        await system.until(lambda: engine.num_started == 1)
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
        await system.until(lambda: engine.num_cancelled == 1)
        system.assert_empty()


async def test_while_the_server_does_not_send_the_engine_waits():
    async with running(num_engines=1, **SERVE) as system:
        [engine] = system.engines
        engine.chunk = b"data: " + b"x" * 1000 + b"\n\n"
        browser = Browser(system, chat(system, max_tokens=2000))
        browser.reads.clear()
        asking = asyncio.create_task(browser.ask())
        window = system.gateway.config.gateway.stream_window_bytes
        await system.until(lambda: engine.num_steps * 1000 >= window / 2)
        await asyncio.sleep(0.3)
        assert engine.num_steps * 1000 <= 2 * window
        browser.reads.set()
        await asking
        assert browser.body.count(b"data: x") == 2000
        system.assert_empty()


async def test_what_breaks_off_is_the_servers_to_close(monkeypatch):
    async with running(num_engines=1, **SERVE) as system:

        def fail(*_: Any) -> None:
            raise ZeroDivisionError("ours")

        monkeypatch.setattr(system.gateway.driver, "acknowledge_bytes", fail)
        browser = Browser(system, chat(system, max_tokens=1000))

        async def send(message: dict[str, Any]) -> None:
            if any(each["type"] == message["type"] == "http.response.start" for each in started):
                raise RuntimeError("a second head")
            started.append(message)

        started: list[dict[str, Any]] = []
        browser._send = send  # type: ignore[method-assign]
        with pytest.raises(ZeroDivisionError):
            await browser.ask()
        await system.until(lambda: system.num_engine_streams == 0)
        monkeypatch.undo()
        system.assert_empty()
