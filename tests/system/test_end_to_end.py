"""The main job, whole: `headway serve` with two real vLLM engines, asked by real clients."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import httpx
import msgspec
import psutil
import pytest
from anthropic import Anthropic
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI

from benchmarks.systems.processes import engine_core
from router.fleet.ledger import Ledger
from serving.gateway.observe.state import GatewayState
from tests.docs.documents import blocks
from tests.support.tiny_model import tiny_model
from tests.system.served import START_TIMEOUT_S, make_serve, start_headway

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]  # `make serve` compiles the core

MODEL = "SmolLM2-135M-Instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
BLOCK_SIZE = 32


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Run `make serve`, as the README has it, unless somebody has its port."""
    log = tmp_path_factory.mktemp("serve") / "log"
    server = make_serve(log)
    process = server.process
    try:
        deadline = time.monotonic() + 2 * START_TIMEOUT_S
        while not server.is_ready():
            assert process.poll() is None, f"headway serve ended:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"not ready:\n{log.read_text()}"
            time.sleep(0.2)
        yield server
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        process.wait(60)
        left = [child for child in children if child.is_running()]
        for child in left:
            child.kill()
    # The end of the fixture is a test too: Ctrl-C leaves no process and no port.
    assert "] Error" not in log.read_text()  # what make says of a status that is not 0
    assert not left
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.port)) != 0


def test_what_the_documents_ask_gets_paris(server):
    """Every block that asks something in README and quickstart, as it is written there."""
    for block in (block for block in blocks() if "127.0.0.1:8000" in block.text):
        text = block.text.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
        how = [sys.executable, "-c"] if block.kind == "python" else ["sh", "-c"]
        reply = subprocess.run([*how, text], capture_output=True, text=True, check=True)
        assert "Paris" in reply.stdout, block


def test_the_openai_client_gets_paris_every_way(server):
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    asked = {"model": MODEL, "messages": QUESTION, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    text = whole.choices[0].message.content
    assert "Paris" in text
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage == whole.usage
    assert [model.id for model in client.models.list()] == [MODEL]

    async def ask_async() -> str:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            reply = await client.chat.completions.create(**asked)
            stream = await client.chat.completions.create(**asked, stream=True)
            parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(parts) == reply.choices[0].message.content
            return reply.choices[0].message.content

    assert asyncio.run(ask_async()) == text


def test_anthropics_client_gets_paris_whole_and_streamed(server):
    with Anthropic(base_url=server.url, api_key="none") as client:
        asked = {"model": MODEL, "messages": QUESTION, "max_tokens": 20}
        asked["extra_body"] = {"temperature": 0}
        [block] = client.messages.create(**asked).content
        assert "Paris" in block.text
        with client.messages.stream(**asked) as stream:
            assert "".join(stream.text_stream) == block.text


@pytest.mark.timeout(600)  # starts two engines more
def test_when_both_engines_are_killed_the_same_curl_answers_through_a_second_server(
    server, tmp_path
):
    """Two small engines here; the server of the other tests is the provider."""
    providers = [{"name": "second", "url": f"{server.url}/v1", "models": {MODEL: MODEL}}]
    log = tmp_path / "log"
    first = start_headway(
        log,
        *("--replicas", "2", "--model", str(tiny_model(tmp_path / "tiny"))),
        *("--served-model-name", MODEL, "--set", f"providers={json.dumps(providers)}"),
    )
    process = first.process
    curl = ["curl", "-sS", "-i", f"{first.url}/v1/chat/completions", "-d"]
    body = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 20}
    curl.append(json.dumps(body))
    try:
        # The launcher's own word: gateways know the engines a little earlier.
        is_ready = lambda: "ready after" in log.read_text()  # noqa: E731
        first.until(lambda: process.poll() is not None or is_ready(), START_TIMEOUT_S)
        assert process.poll() is None, log.read_text()
        reply = subprocess.run(curl, capture_output=True, check=True, text=True).stdout
        assert "x-headway-provider" not in reply
        replicas = first.state().replicas.values()
        cores = [engine_core(psutil.Process(each.info.pid)) for each in replicas]
        assert len(cores) == 2
        for core in cores:
            core.kill()
        start = time.monotonic()
        reply = subprocess.run(curl, capture_output=True, check=True, text=True).stdout
        assert reply.startswith("HTTP/1.1 200")
        assert "x-headway-provider: second" in reply
        assert "Paris" in reply
        assert time.monotonic() - start < 10
        assert first.state().outcomes["failed"] == 0
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 0, log.read_text()


def test_vllms_own_features_pass_through(server):
    """`n`, logprobs, stop, structured output and token ids come as vLLM makes them."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    reply = client.chat.completions.create(
        model=MODEL, messages=QUESTION, n=2, temperature=1.0, seed=1, max_tokens=4, logprobs=True
    )
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert all(len(choice.logprobs.content) == 4 for choice in reply.choices)
    reply = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, stop=["France"], max_tokens=20
    )
    assert reply.choices[0].finish_reason == "stop"
    assert "France" not in reply.choices[0].message.content
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}}
    schema |= {"required": ["city"], "additionalProperties": False}
    reply = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    )
    assert json.loads(reply.choices[0].message.content)["city"] in ("Paris", "Rome")
    reply = client.completions.create(model=MODEL, prompt=[1, 2, 3, 4], max_tokens=3, temperature=0)
    assert reply.usage.prompt_tokens == 4


def test_32_streams_at_once_finish_and_leave_no_booking(server):
    async def tell(client: AsyncOpenAI, number: int) -> tuple[int, str]:
        words = f"Tell me about the number {number}. " * (40 if number % 5 == 0 else 1)
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": words}],
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage.completion_tokens <= 24
        reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
        return chunks[-1].usage.completion_tokens, reasons[-1]

    async def tell_all() -> list[tuple[int, str]]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(tell(client, number) for number in range(32)))

    before = server.state().outcomes["completed"]
    ends = asyncio.run(tell_all())
    assert len(ends) == 32
    assert all(count > 0 and reason in ("stop", "length") for count, reason in ends)
    server.until(server.idle, 5)
    state = server.state()
    assert state.outcomes["completed"] == before + 32
    assert state.num_placed == 0
    for replica in state.replicas.values():
        assert replica.ledger == Ledger().state()
        assert replica.snapshot.num_pending_prefill_tokens == 0
        assert replica.snapshot.kv_cache_usage == 0


def _prompt(seed: int, num_tokens: int) -> list[int]:
    """Token ids that no prefix cache has seen."""
    return random.Random(seed).choices(range(1000, 40_000), k=num_tokens)


def test_pending_prefill_agrees_with_vllms_counters(server):
    """submitted - computed (vLLM's count) - cached (vLLM's count) = pending, at every look."""
    server.until(server.idle, 10)
    assert server.http.post("/headway/policy", json={"policy": "round_robin"}).status_code == 200
    lengths = [1500, 900, 1300, 700, 1100, 40]
    base = {
        name: server.total(name)
        for name in ("num_prefill_tokens_total", "num_prefix_hits_total", "num_output_tokens_total")
    }

    async def send_all() -> list[tuple[int, int]]:
        looks = []
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            tasks = [
                asyncio.create_task(
                    client.post(
                        "/v1/completions",
                        json={
                            "model": MODEL,
                            "prompt": _prompt(seed, length),
                            "max_tokens": 3,
                            "ignore_eos": True,
                        },
                    )
                )
                for seed, length in enumerate(lengths)
            ]
            while not all(task.done() for task in tasks):
                reply = await client.get("/headway/state")
                state = msgspec.json.decode(reply.content, type=GatewayState)
                replicas = state.replicas.values()
                snapshots = [replica.snapshot for replica in replicas]
                if all(not replica.ledger.num_unacknowledged for replica in replicas) and (
                    sum(replica.snapshot.last_booking for replica in replicas) >= sent
                ):
                    computed = sum(s.num_prefill_tokens_total for s in snapshots)
                    cached = sum(s.num_prefix_hits_total for s in snapshots)
                    expected = (
                        sum(lengths)
                        - (computed - base["num_prefill_tokens_total"])
                        - (cached - base["num_prefix_hits_total"])
                    )
                    pending = sum(s.num_pending_prefill_tokens for s in snapshots)
                    looks.append((pending, expected))
                await asyncio.sleep(0.02)
            assert {task.result().status_code for task in tasks} == {200}
        return looks

    sent = sum(snapshot.last_booking for snapshot in server.snapshots()) + len(lengths)
    looks = asyncio.run(send_all())
    server.http.post("/headway/policy", json={"policy": "headway"})
    assert len({pending for pending, _ in looks}) >= 4, f"too few states seen: {looks}"
    assert [pending for pending, _ in looks] == [expected for _, expected in looks]
    server.until(server.idle, 5)
    computed = server.total("num_prefill_tokens_total") - base["num_prefill_tokens_total"]
    assert computed == sum(lengths)
    generated = server.total("num_output_tokens_total") - base["num_output_tokens_total"]
    assert generated == 3 * len(lengths)


def test_a_conversation_stays_where_its_prefix_is(server):
    """The gateway knows which engine holds a prefix from that engine's own KV events."""
    system = "Remember: " + " ".join(f"item {number} is number {number}." for number in range(60))

    def ask(question: str) -> int:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        body = {"model": MODEL, "messages": messages, "max_tokens": 4, "temperature": 0}
        reply = server.http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200
        server.until(server.idle, 10)
        return reply.json()["usage"]["prompt_tokens"]

    def engines() -> list[dict]:
        return list(server.state().replicas.values())

    def hits() -> list[int]:
        return [engine.snapshot.num_prefix_hits_total for engine in engines()]

    before, blocks_before = hits(), [engine.num_cached_blocks for engine in engines()]
    num_tokens = ask("What is item 7?")
    grown = [
        engine.num_cached_blocks - blocks
        for engine, blocks in zip(engines(), blocks_before, strict=True)
    ]
    # The prompt's whole blocks, and one that the answer may have filled.
    assert min(grown) == 0
    assert max(grown) in (num_tokens // BLOCK_SIZE, (num_tokens + 4) // BLOCK_SIZE)
    home = grown.index(max(grown))
    assert hits()[home] - before[home] < num_tokens // 10  # nobody had sent it yet
    for number in range(6):
        before = hits()
        ask(f"What is item {number}?")
        found = [now - then for now, then in zip(hits(), before, strict=True)]
        assert found[home] >= 0.8 * num_tokens
        assert found[1 - home] == 0  # both were idle: only knowledge led them here
    # Without that knowledge, mid-run, everything goes on.
    url = "/headway/policy"
    assert server.http.post(url, json={"policy": "headway", "ablate": ["prefix"]}).is_success
    try:
        for number in range(4):
            assert ask(f"And what is item {number}?") >= num_tokens - 10
    finally:
        assert server.http.post(url, json={"policy": "headway"}).is_success


def test_kv_usage_is_vllms_block_count(server):
    """A prompt of 1000 tokens takes 32 blocks of 32 while its first 24 tokens are decoded."""
    server.until(server.idle, 10)
    body = {"model": MODEL, "prompt": _prompt(100, 1000), "max_tokens": 20, "ignore_eos": True}
    looks = []
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            for replica in server.state().replicas.values():
                snapshot, info = replica.snapshot, replica.info
                if snapshot.num_decoding_reqs:
                    looks.append(snapshot.num_decode_context_tokens)
                    num_blocks = info.num_kv_tokens // BLOCK_SIZE
                    assert round(snapshot.kv_cache_usage * num_blocks, 6) == 32
                    used = info.num_kv_tokens - snapshot.num_free_kv_tokens
                    assert used == 32 * BLOCK_SIZE
    assert len(looks) >= 5
    assert looks == sorted(looks)
    assert 1001 <= looks[0] <= looks[-1] <= 1020


def test_a_client_that_leaves_frees_its_slot_within_a_second(server):
    server.until(server.idle, 10)
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 2000, "ignore_eos": True}
    with server.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as reply:
        lines = reply.iter_lines()  # kept: an iterator that is dropped closes the connection
        next(lines)
        server.until(lambda: server.total("num_running_reqs") == 1, 5)
    left = time.monotonic()
    server.until(lambda: server.total("num_running_reqs") == 0, 1)
    assert time.monotonic() - left < 1
    # And one that waits for a whole reply, without a stream to write to.
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/chat/completions", json=body, timeout=1.0)
    server.until(lambda: server.total("num_running_reqs") == 0, 1)
    server.until(server.idle, 5)
    assert server.state().outcomes["reneged"] >= 2


BAD = {
    "malformed JSON": ("/v1/chat/completions", b'{"model": ', 400),
    "not an object": ("/v1/chat/completions", b"[1]", 400),
    "a wrong type": (
        "/v1/chat/completions",
        {"model": MODEL, "messages": QUESTION, "temperature": "hot"},
        400,
    ),
    "messages of no sense": ("/v1/chat/completions", {"model": MODEL, "messages": [1, 2]}, 400),
    "no messages": ("/v1/chat/completions", {"model": MODEL}, 400),
    "an unknown model": ("/v1/chat/completions", {"model": "gpt-9", "messages": QUESTION}, 404),
    "an over-long prompt": ("/v1/completions", {"model": MODEL, "prompt": "word " * 20_000}, 400),
    "over-long token ids": ("/v1/completions", {"model": MODEL, "prompt": [5] * 20_000}, 400),
    "too many tokens asked for": (
        "/v1/completions",
        {"model": MODEL, "prompt": "x", "max_tokens": 1_000_000},
        400,
    ),
    "embeddings of a chat model": ("/v1/embeddings", {"model": MODEL, "input": "x"}, 400),
    "a 50 MB body": ("/v1/completions", {"model": MODEL, "prompt": "x" * 50_000_000}, 413),
    "an unknown path": ("/v1/nothing", {}, 404),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_prompt_4xx_and_touches_no_engine(server, name):
    path, body, status = BAD[name]
    before = server.settled_steps()
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    start = time.monotonic()
    reply = server.http.post(path, content=content, headers={"content-type": "application/json"})
    assert time.monotonic() - start < 3
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error["message"]
    assert {"type", "param", "code"} <= error.keys()
    assert server.settled_steps() == before
    server.until(server.idle, 2)


def test_the_openai_client_understands_our_errors(server):
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    with pytest.raises(NotFoundError, match="gpt-9"):
        client.chat.completions.create(model="gpt-9", messages=QUESTION)
    with pytest.raises(BadRequestError):
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=-1)
