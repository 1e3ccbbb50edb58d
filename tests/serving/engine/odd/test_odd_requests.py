"""Three thousand odd requests to a real engine: each is answered or refused, and nothing stays."""

import asyncio
import gc
import json
import os

import h11
import psutil
import pytest

from tests.serving.engine.conftest import Served
from tests.serving.engine.odd.odd_requests import Generator, Odd

pytestmark = pytest.mark.engine

SEED, NUM_REQUESTS, NUM_AT_ONCE = 0, 3000, 16
GROWTH_BYTES = 100 * 2**20  # of the memory of gateway and replica, which share a process here


class Answer:
    """What came back."""

    def __init__(self, received: bytes, odd: Odd) -> None:
        self.status = 0
        self.body = b""
        self.content_type = ""
        connection = h11.Connection(h11.CLIENT)
        method = odd.sent.split(b" ", 1)[0]
        connection.send(
            h11.Request(
                method="HEAD" if method == b"HEAD" else "GET", target="/", headers=[("host", "h")]
            )
        )
        connection.send(h11.EndOfMessage())
        connection.receive_data(received)
        connection.receive_data(b"")
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Response):
                self.status = event.status_code
                self.content_type = dict(event.headers).get(b"content-type", b"").decode()
            elif isinstance(event, h11.Data):
                self.body += bytes(event.data)
            elif not isinstance(event, h11.InformationalResponse):
                return


async def send(port: int, odd: Odd) -> bytes:
    """Return all that comes back, or as much as the client waits for."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = b""
    try:
        writer.write(odd.sent)
        if b"HTTP/1.1" not in odd.sent[:3100] or b"99999999999999" in odd.sent:
            writer.write_eof()  # the server would wait for more
        async with asyncio.timeout(90):
            while chunk := await reader.read(65536):
                received += chunk
                if odd.leaves_after is not None and len(received) > odd.leaves_after:
                    break
    except (ConnectionResetError, BrokenPipeError):
        pass
    finally:
        writer.close()
    return received


def fault(odd: Odd, received: bytes) -> str:
    """What is wrong with the answer, in words; empty if nothing."""
    if odd.leaves_after is not None or not received:
        return ""
    try:
        answer = Answer(received, odd)
    except h11.RemoteProtocolError as error:
        return f"no HTTP: {error}"
    if answer.status >= 500 and answer.status != 501:
        return f"{answer.status}: {answer.body[:300]!r}"
    is_api = odd.path.startswith("/v1") and not odd.sent.startswith(b"HEAD")
    if answer.status >= 400 and is_api:
        try:
            error = json.loads(answer.body)["error"]
        except (ValueError, KeyError, TypeError):
            return f"{answer.status}, not OpenAI's JSON: {answer.body[:300]!r}"
        if set(error) < {"message", "type", "param", "code"} or not error["message"]:
            return f"{answer.status}, incomplete: {answer.body[:300]!r}"
    return ""


async def send_all(port: int, odds: list[Odd]) -> list[tuple[Odd, bytes]]:
    queue = iter(odds)
    received: list[tuple[Odd, bytes]] = []

    async def work() -> None:
        for odd in queue:
            received.append((odd, await send(port, odd)))

    await asyncio.gather(*(work() for _ in range(NUM_AT_ONCE)))
    return received


def resources() -> tuple[int, int]:
    """Memory in bytes, and file descriptors, of this process: the gateway's and the replica's."""
    gc.collect()
    process = psutil.Process(os.getpid())
    return process.memory_info().rss, process.num_fds()


@pytest.mark.timeout(900)
def test_each_is_answered_or_refused_and_nothing_stays(served: Served):
    port = served.config.gateway.port
    generator = Generator(SEED)
    asyncio.run(send_all(port, [generator.draw() for _ in range(300)]))  # what is loaded once
    memory, num_fds = resources()
    answers = asyncio.run(send_all(port, [generator.draw() for _ in range(NUM_REQUESTS)]))
    faults = [f"{odd.kind}: {text}" for odd, got in answers if (text := fault(odd, got))]
    assert len(answers) == NUM_REQUESTS
    assert not faults, f"seed {SEED}, {len(faults)} faults:\n" + "\n".join(faults)
    served.assert_nothing_is_left()
    state = served.gateway.state()
    assert state.num_open_requests == state.num_placed == state.num_record_bytes == 0
    assert state.held.num_requests == state.num_incoming_bytes == 0
    assert state.breaker_events == []
    assert state.suspects.num_suspects == state.suspects.num_refused == 0
    [replica] = state.replicas.values()
    assert replica.ledger.num_open == 0
    memory_after, num_fds_after = resources()
    assert num_fds_after <= num_fds + 5
    assert memory_after - memory < GROWTH_BYTES
