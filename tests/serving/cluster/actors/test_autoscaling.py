"""Real Ray Serve, emulated engines: from none to two and back, and no stream is cut."""

import json
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest
import yaml

from tests.system.served import START_TIMEOUT_S, Server, start_headway

pytestmark = pytest.mark.timeout(300)

CONFIG = {
    "served_model_name": "emulated",
    "device": "cpu",
    "replicas": {"min": 0, "max": 2, "start_s": 3, "keep_s": 3, "zero_after_s": 3},
    # Slow enough for a dozen streams to be work for two.
    "engine": {
        "factory": "serving.engine.emulated.engine:EmulatedEngine",
        "args": {"profile": "smollm2-cpu"},
    },
}


def config_file(folder: Path) -> Path:
    application = {
        "name": "headway",
        "route_prefix": "/",
        "import_path": "serving.cluster.application:build",
        "args": CONFIG,
    }
    path = folder / "autoscaled.yaml"
    path.write_text(yaml.safe_dump({"proxy_location": "Disabled", "applications": [application]}))
    return path


@pytest.fixture
def server(tmp_path):
    server = start_headway(tmp_path / "log", str(config_file(tmp_path)))
    try:
        server.until(lambda: is_up(server), START_TIMEOUT_S)
        yield server
    finally:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


def is_up(server: Server) -> bool:
    assert server.process.poll() is None
    try:
        return server.http.get("/health").status_code == 200
    except httpx.HTTPError:
        return False


def num_engines(server: Server) -> int:
    return server.http.get("/health").json()["num_engines"]


def stream(server: Server, num_prompt_tokens: int, num_tokens: int) -> list[str]:
    """Return the lines of a reply's stream."""
    body = {
        "model": "emulated",
        "stream": True,
        "max_tokens": num_tokens,
        "messages": [{"role": "user", "content": "word " * num_prompt_tokens}],
    }
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=120) as reply:
        assert reply.status_code == 200
        return [line for line in reply.iter_lines() if line]


def num_chunks(lines: list[str]) -> int:
    """Return how many tokens came; the stream is whole and has no error in it."""
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines[:-1] if line.startswith("data: ")]
    assert not any("error" in chunk for chunk in chunks)
    return len(chunks)


def test_from_none_to_two_and_back(server):
    """The first request is told what it waits for; work brings a second engine; all end whole."""
    assert num_engines(server) == 0
    first = stream(server, 10, 5)
    assert "waiting for an engine to start" in first[0]
    assert num_chunks(first) >= 5

    replies: list[list[str]] = []
    clients = []
    most = 0
    deadline_s = time.monotonic() + 120.0
    while most < 2:
        assert time.monotonic() < deadline_s, "no second engine"
        if sum(client.is_alive() for client in clients) < 10:  # as many keep an engine busy
            client = threading.Thread(target=lambda: replies.append(stream(server, 200, 100)))
            client.start()
            clients.append(client)
        time.sleep(0.2)
        most = max(most, num_engines(server))
    # These are under way while the engine that they are in is emptied.
    server.until(lambda: num_engines(server) == 0, 90.0)
    for client in clients:
        client.join(60.0)
    assert len(replies) == len(clients)
    assert all(num_chunks(lines) >= 100 for lines in replies)
