"""A poisoner and a good client before two real vLLM engines: the good one never notices.

The good client asks once a second. The poisoner sends, one after the other, all that is known to
hurt an engine, and at last a request under which engines die: that, as vLLM is mended here, only
a signal can do, which the test sends to whichever engine core the request is in.
"""

import json
import threading
import time

import httpx
import psutil
import pytest

from benchmarks.systems.processes import engine_core
from tests.support.tiny_model import tiny_model
from tests.system.served import START_TIMEOUT_S, Server, start_headway

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
QUESTION = {"messages": [{"role": "user", "content": "hi"}]}
LONG = [100 + number % 1000 for number in range(900)]
NUM_GOOD, SLOWEST_S = 60, 10.0
# By name: the path, fields as JSON, and what the poisoner may be told.
POISONS: dict[str, tuple[str, str, set[int]]] = {
    "500": (CHAT, '"top_k": 1000000000000000000000000000000, "stream": false', {400}),
    "500, streamed": (CHAT, '"top_k": 1000000000000000000000000000000, "stream": true', {400}),
    "digits": (CHAT, '"n": ' + "9" * 309, {400}),
    "fields": (CHAT, '"structured_outputs": ["a"]', {400}),
    "memory": (
        CHAT,
        '"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": '
        '{"type": "array", "minItems": 1000000000}}}',
        {400},
    ),
    "grammar": (CHAT, '"structured_outputs": {"regex": "a{1000000}"}', {200, 400}),
    "late grammar": (CHAT, '"structured_outputs": {"grammar": "root ::= root"}', {400}),
    "death": (COMPLETIONS, f'"prompt": {LONG}, "seed": 1, "temperature": 1', {200}),
    "blocked loop": (COMPLETIONS, f'"prompt": {LONG}, "prompt_logprobs": 20', {200, 400}),
    "all logprobs": (COMPLETIONS, f'"prompt": {LONG}, "prompt_logprobs": -1', {400}),
    "depth": (CHAT, '"metadata": ' + "[" * 2000 + "]" * 2000, {200, 400}),
    "many": (COMPLETIONS, f'"prompt": {json.dumps([[7] * 30] * 400)}', {200, 400}),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("poison")
    model = tiny_model(folder / "tiny")
    log = folder / "log"
    options = ("--model", str(model), "--set", "served_model_name=tiny", "--replicas", "2")
    options += ("--set", "engine.args.max_model_len=4096", "--set", "engine.args.max_logprobs=-1")
    server = start_headway(log, *options)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not server.is_ready():
            assert server.process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield server
    finally:
        server.process.terminate()
        server.process.wait(60)


class GoodClient(threading.Thread):
    """Asks once a second, and keeps what came of it."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.replies: list[tuple[int, float]] = []  # status and seconds
        self.is_over = threading.Event()
        self._url = url

    def run(self) -> None:
        threads = []
        while not self.is_over.is_set() or len(threads) < NUM_GOOD:
            threads.append(threading.Thread(target=self._ask, args=(len(threads),)))
            threads[-1].start()
            time.sleep(1.0)
        for thread in threads:
            thread.join()

    def _ask(self, number: int) -> None:
        body = {"model": "tiny", "prompt": f"Question {number}:", "max_tokens": 8}
        sent_s = time.monotonic()
        try:
            status = httpx.post(self._url + COMPLETIONS, json=body, timeout=60).status_code
        except httpx.HTTPError:
            status = 0
        self.replies.append((status, time.monotonic() - sent_s))


def poison(server: Server, path: str, fields: str) -> httpx.Response:
    body: dict = {"model": "tiny", "max_tokens": 8}
    body |= QUESTION if path == CHAT else {"prompt": "hi"}
    content = json.dumps(body)[:-1] + ", " + fields + "}"  # of two fields the last one counts
    return server.http.post(
        path, content=content, headers={"content-type": "application/json"}, timeout=120
    )


def kill_whoever_has(server: Server, num_tokens: int) -> str:
    """Kill the core of the engine that has a prompt of this size; return the engine's id."""

    def owner():
        for replica_id, replica in server.state().replicas.items():
            if replica.ledger.num_open and replica.num_pending_prefill_tokens > num_tokens // 3:
                return replica_id, replica.info.pid
        return None

    replica_id, pid = server.until(owner, 150)
    engine_core(psutil.Process(pid)).kill()
    server.until(lambda: replica_id not in server.state().replicas, 30)
    return replica_id


def test_a_good_client_never_notices(server: Server) -> None:
    before = server.state().replicas.keys()
    good = GoodClient(server.url)
    good.start()
    try:
        told = {name: poison(server, path, text) for name, (path, text, _) in POISONS.items()}
        for name, (_, _, expected) in POISONS.items():
            assert told[name].status_code in expected, f"{name}: {told[name].text[:300]}"
        assert server.state().replicas.keys() == before, "an engine was lost"
        assert server.state().breaker_events == []
        lost = deadly(server)
        assert len(set(lost)) == 2
    finally:
        good.is_over.set()
        good.join()
    assert {status for status, _ in good.replies} == {200}, good.replies
    assert len(good.replies) >= NUM_GOOD
    assert max(seconds for _, seconds in good.replies) <= SLOWEST_S
    assert {event.reason for event in server.state().breaker_events if event.reason} == {"lost"}


def deadly(server: Server) -> list[str]:
    """Send a request under which two engines are killed. Return which, once it is refused."""
    long = [5 + number % 900 for number in range(4000)]
    body = {"model": "tiny", "prompt": long, "max_tokens": 4, "user": "poison"}
    replies: list[httpx.Response] = []

    def send() -> None:
        replies.append(httpx.post(server.url + COMPLETIONS, json=body, timeout=240))

    sender = threading.Thread(target=send)
    sender.start()
    lost = [kill_whoever_has(server, len(long)), kill_whoever_has(server, len(long))]
    sender.join()
    replies.append(httpx.post(server.url + COMPLETIONS, json=body, timeout=60))
    for reply in replies:
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "ends_engines")
    return lost
