"""Streams of real vLLM engines that break off and go on in another: nothing shows.

One engine of a tiny model in this process, which the gateway knows as two: of
a request that was cut off nothing is left in it, so it is as good as another.
The connection to the one that answers is cut after some chunks; a moment later
it can be connected to again, under another name.
"""

import asyncio
import contextlib
import gc
import itertools
import json

import httpx
import pytest
import pytest_asyncio

from serving.config import parse
from serving.engine.vllm.engine import VllmEngine
from serving.gateway.app import Gateway
from serving.gateway.http.listener import Listener
from serving.gateway.observe.state import GatewayState
from serving.planning.hardware import detect_hardware
from serving.planning.plan import make_plan
from serving.stream.server import StreamServer
from tests.support.running_gateway import free_port
from tests.support.tiny_model import tiny_model
from tests.system.named_events import all_said, named_events

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPT = "Once upon a time there was a little girl who"
QUESTION = [{"role": "user", "content": PROMPT}]
TOOL = {"name": "look_up", "parameters": {"type": "object", "properties": {"x": {}}}}
ARGS = {
    "dtype": "float32",  # so that a prefill and a decode of the same tokens agree on the next
    "max_model_len": 1024,
    "kv_cache_memory_bytes": 32 * 2**20,
    "block_size": 32,
    "enforce_eager": True,
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
}


class Pair:
    """A gateway over HTTP and what it takes for two engines, whose connections can be cut."""

    def __init__(self, gateway: Gateway, engine: VllmEngine, http: httpx.AsyncClient):
        self.gateway = gateway
        self.engine = engine
        self.http = http
        self.servers: dict[str, StreamServer] = {}
        self.members: dict[str, dict] = {}
        self.num_cuts = 0
        self._ids = itertools.count()

    async def connect(self) -> None:
        """Offer the engine under a new name, as Ray does with one that it has started anew."""
        server = StreamServer(self.engine, 64 * 2**10)
        host, port = await server.listen("127.0.0.1")
        name = f"r{next(self._ids)}"
        self.servers[name] = server
        self.members[name] = {"host": host, "port": port, "secret": server.secret}
        self.gateway.driver.engines.set_members(self.members)
        while name not in self.gateway.driver.engines.infos:
            await asyncio.sleep(0.01)

    async def cut(self) -> None:
        """Lose the engine that has a stream, and find it again under another name."""
        names = [name for name, server in self.servers.items() if server.num_streams]
        if not names:
            return  # it has just answered
        self.num_cuts += 1
        server = self.servers.pop(name := names[0])
        del self.members[name]
        server.close()
        await self.connect()

    async def ask(self, path: str, body: dict, *, cut_at: tuple[int, ...] = ()) -> bytes:
        """The body of the reply, cut off after each of so many chunks."""
        headers = {"x-request-id": "a-request"}
        chunks = []
        async with self.http.stream("POST", path, json=body, headers=headers) as reply:
            assert reply.status_code == 200, await reply.aread()
            async for line in reply.aiter_lines():
                chunks.append(line)
                if len([chunk for chunk in chunks if chunk]) in cut_at and line:
                    await self.cut()
        return "\n".join(chunks).encode()

    def state(self) -> GatewayState:
        return self.gateway.state()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory):
    model = tiny_model(tmp_path_factory.mktemp("tiny"))
    port = free_port()
    config = parse(
        {
            "model": str(model),
            "served_model_name": "tiny",
            "device": "cpu",
            "replicas": 1,
            "gateway": {"port": port},
            "engine": {"args": ARGS},
            "router": {"breaker": {"slow_start_s": 0.0}},
        }
    )
    plan = make_plan(config, detect_hardware())
    engine = await VllmEngine.start(config, plan, local_rank=0)
    gateway = Gateway(config, "gateway")
    listener = Listener(gateway.app, config.gateway)
    await listener.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        pair = Pair(gateway, engine, http)
        for _ in range(2):
            await pair.connect()
        yield pair
    gateway.close()
    for server in pair.servers.values():
        server.close()
    await listener.stop()
    await engine.shutdown()


def events(body: bytes) -> list[dict]:
    """The JSON of a reply's server-sent events."""
    data = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
    assert data[-1] == b"[DONE]"
    return [json.loads(event) for event in data[:-1]]


GREEDY = {
    "temperature": 0,
    "max_tokens": 40,
    "ignore_eos": True,
    "stream": True,
    "return_token_ids": True,
}
STRING = {"type": "string", "maxLength": 20}
SCHEMA = {"name": "a", "schema": {"type": "object", "properties": {"a": STRING}}}

CASES = {
    "chat": (CHAT, {}),
    "usage": (CHAT, {"stream_options": {"include_usage": True}}),
    "continuous usage": (
        CHAT,
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "log probabilities": (CHAT, {"logprobs": True, "top_logprobs": 3}),
    # vLLM takes no n > 1 with temperature 0, and what it takes for nearly that is 0.01, at
    # which a draw may fall either way: of one candidate it can only fall one way.
    "three sequences": (
        CHAT,
        {"n": 3, "temperature": 1.0, "top_k": 1, "stream_options": {"include_usage": True}},
    ),
    "three sequences, each with its seed": (CHAT, {"n": 3, "temperature": 1.0, "seed": 7}),
    "tools": (CHAT, {"tools": [{"type": "function", "function": TOOL}]}),
    "penalty on what was generated": (CHAT, {"frequency_penalty": 1.5}),
    "penalty and log probabilities": (
        COMPLETIONS,
        {"prompt": PROMPT, "presence_penalty": 1.0, "logprobs": 2},
    ),
    "echo with log probabilities": (COMPLETIONS, {"prompt": PROMPT, "logprobs": 2, "echo": True}),
    "structured output": (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": SCHEMA}},
    ),
    "seed": (CHAT, {"temperature": 1.0, "seed": 7}),
    "completion": (COMPLETIONS, {"prompt": PROMPT}),
    "completion of token ids": (COMPLETIONS, {"prompt": [100, 200, 300, 400, 500]}),
    "completion with log probabilities": (COMPLETIONS, {"prompt": PROMPT, "logprobs": 2}),
}


def content(body: bytes) -> tuple:
    """All that a reply says, whatever portions it came in, which differ from run to run.

    Log probabilities last: they are the same only to what float32 is good for.
    """
    choices: dict[int, list] = {}
    values: dict[int, list[float]] = {}
    for event in events(body):
        for choice in event["choices"]:
            said = choices.setdefault(choice["index"], ["", [], [], None, None])
            delta = choice.get("delta") or {}
            said[0] += delta.get("content") or choice.get("text") or ""
            said[1] += choice.get("token_ids") or []
            tokens, logprobs = top_tokens(choice.get("logprobs") or {})
            said[2] += tokens
            values.setdefault(choice["index"], []).extend(logprobs)
            said[3] = choice["finish_reason"] or said[3]
            said[4] = choice.get("stop_reason") or said[4]
    (one_id,) = {event["id"] for event in events(body)}
    assert len({event["created"] for event in events(body)}) == 1
    return one_id, choices, events(body)[-1].get("usage"), values


def assert_same(resumed: bytes, undisturbed: bytes) -> None:
    *said, values = content(resumed)
    *expected, expected_values = content(undisturbed)
    assert said == expected
    assert values.keys() == expected_values.keys()
    for index, each in expected_values.items():
        assert values[index] == pytest.approx(each, abs=2e-3)


def top_tokens(found: dict) -> tuple[list[str], list[float]]:
    """Tokens that log probabilities are told of, and these, in one order."""
    tops = [each["top_logprobs"] for each in found.get("content") or []]
    pairs = [(top["token"], top["logprob"]) for each in tops for top in each]
    for token, value in zip(
        found.get("tokens") or [], found.get("token_logprobs") or [], strict=True
    ):
        pairs.append((token, 0.0 if value is None else value))  # the first of a prompt has none
    return [token for token, _ in pairs], [value for _, value in pairs]


def request(path: str, fields: dict) -> dict:
    question = {"messages": QUESTION} if path == CHAT else {}
    return {"model": "tiny", **question, **GREEDY, **fields}


@pytest.mark.parametrize("name", CASES)
async def test_nothing_shows(pair, name):
    path, fields = CASES[name]
    body = request(path, fields)
    undisturbed = await pair.ask(path, body)
    # Twice within eight tokens of each sequence it would be what ends engines:
    # `router.resilience.suspects`.
    for cuts in ((3, 12), (1, 11, 30)):
        cut_at = tuple(cut * fields.get("n", 1) for cut in cuts)
        num_made = 0
        while not num_made:  # all of a reply may be on its way when its engine is cut off
            before, num_cuts = pair.state().retries.num_made, pair.num_cuts
            resumed = await pair.ask(path, body, cut_at=cut_at)
            assert_same(resumed, undisturbed)
            num_made = pair.state().retries.num_made - before
            assert num_made <= pair.num_cuts - num_cuts <= len(cut_at)
        assert pair.state().num_open_requests == pair.state().num_record_bytes == 0


NAMED = {
    "messages": ("/v1/messages", {"messages": QUESTION, "max_tokens": 40, "system": "Tell."}),
    "responses": ("/v1/responses", {"input": PROMPT, "max_output_tokens": 40, "ignore_eos": True}),
}


@pytest.mark.parametrize("name", NAMED)
async def test_nothing_shows_in_streams_of_named_events(pair, name):
    """Ids, dates and numbers of events are of one reply, which says what it would have said."""
    path, fields = NAMED[name]
    body = {"model": "tiny", "temperature": 0, "stream": True, **fields}
    undisturbed = all_said(named_events(await pair.ask(path, body)))
    num_made = 0
    while not num_made:
        before = pair.state().retries.num_made
        resumed = named_events(await pair.ask(path, body, cut_at=(14, 60)))
        assert all_said(resumed) == undisturbed
        num_made = pair.state().retries.num_made - before
    if path == "/v1/responses":
        assert [event["sequence_number"] for event in resumed] == list(range(len(resumed)))
        replies = [event["response"] for event in resumed if "response" in event]
        assert len({(reply["id"], reply["created_at"]) for reply in replies}) == 1
        (item,) = replies[-1]["output"]
        assert {event["item_id"] for event in resumed if "item_id" in event} == {item["id"]}
        assert item["content"][0]["text"] == undisturbed[0]
    assert pair.state().num_open_requests == pair.state().num_record_bytes == 0


async def test_a_stop_string_across_the_seam(pair):
    """Its first half was generated by one engine, the second by the other."""
    whole = await pair.ask(COMPLETIONS, request(COMPLETIONS, {"prompt": PROMPT}))
    text = "".join(event["choices"][0]["text"] for event in events(whole))
    pieces = [event["choices"][0]["text"] for event in events(whole)]
    at = len("".join(pieces[:9]))
    stop = text[at - 2 : at + 2]
    body = request(COMPLETIONS, {"prompt": PROMPT, "stop": [stop]})
    undisturbed = await pair.ask(COMPLETIONS, body)
    assert events(undisturbed)[-1]["choices"][0]["stop_reason"] == stop
    for cut_at in range(1, len(events(undisturbed))):
        resumed = await pair.ask(COMPLETIONS, body, cut_at=(cut_at,))
        assert_same(resumed, undisturbed)


async def test_a_reply_that_is_not_streamed_keeps_what_was_generated(pair):
    body = request(CHAT, {"stream": False, "max_tokens": 400})
    undisturbed = json.loads(await pair.ask(CHAT, body))
    task = asyncio.create_task(pair.ask(CHAT, body))
    while pair.state().num_record_bytes < 500:
        await asyncio.sleep(0.01)
    await pair.cut()
    resumed = json.loads(await task)
    assert resumed["usage"] == undisturbed["usage"]
    assert resumed["choices"] == undisturbed["choices"]
    assert resumed["id"] == undisturbed["id"]


async def test_prompt_log_probabilities(pair):
    """Asked for without a stream only: all is computed again, and nothing of it twice."""
    fields = {"prompt": list(range(1000, 1600)), "prompt_logprobs": 1, "stream": False}
    body = request(COMPLETIONS, {**fields, "max_tokens": 300})
    undisturbed = json.loads(await pair.ask(COMPLETIONS, body))
    task = asyncio.create_task(pair.ask(COMPLETIONS, body))
    while pair.state().num_record_bytes < 300:
        await asyncio.sleep(0.01)
    await pair.cut()
    resumed = json.loads(await task)
    assert resumed["usage"] == undisturbed["usage"]
    (choice,), (expected,) = resumed["choices"], undisturbed["choices"]
    assert choice["token_ids"] == expected["token_ids"]
    assert len(choice["prompt_logprobs"]) == len(expected["prompt_logprobs"]) == 600


async def test_without_a_seed_the_rest_is_another_sample_behind_the_same_beginning(pair):
    body = request(CHAT, {"temperature": 1.0, "stream_options": {"include_usage": True}})
    resumed = events(await pair.ask(CHAT, body, cut_at=(20,)))
    assert resumed[-1]["usage"]["completion_tokens"] == 40
    assert len({event["id"] for event in resumed}) == 1


async def test_what_does_not_come_again_ends_in_an_error(pair, monkeypatch):
    """A draw without a seed, taken for one that can be repeated."""
    monkeypatch.setattr("serving.engine.vllm.resume._must_regenerate", lambda params: True)
    reply = await pair.ask(CHAT, request(CHAT, {"temperature": 1.0}), cut_at=(10,))
    assert b"generated again, it differs from what had been sent" in reply
    assert b"[DONE]" not in reply
    assert pair.state().num_open_requests == 0
    async with asyncio.timeout(5):
        while any(server.num_streams for server in pair.servers.values()):
            await asyncio.sleep(0.01)


async def test_a_resumed_request_is_counted_once(pair):
    finished = []
    observe_end = pair.gateway.metrics.observe_end
    pair.gateway.metrics.observe_end = lambda exchange: finished.append(exchange.usage)
    try:
        await pair.ask(CHAT, request(CHAT, {}), cut_at=(10,))
    finally:
        pair.gateway.metrics.observe_end = observe_end
    assert [usage.num_output_tokens for usage in finished] == [40]


async def test_nothing_is_computed_for_who_hung_up_with_a_token_on_its_way(pair):
    """In the same iteration of the loop; vLLM's own abort would come with the garbage collector."""
    live = pair.engine._llm.output_processor.request_states
    stats = pair.engine._stats
    on_step, num_steps = stats._on_step, 0

    def step_and_hang_up() -> None:
        nonlocal num_steps
        on_step()
        num_steps += 1
        if num_steps == 5:
            for server in pair.servers.values():
                for connection in server._connections:
                    for call in list(connection._calls.values()):
                        call.cancel()

    gc.collect()
    gc.disable()
    stats._on_step = step_and_hang_up
    try:
        body = request(COMPLETIONS, {"prompt": PROMPT, "max_tokens": 900})
        with contextlib.suppress(httpx.HTTPError):
            await pair.ask(COMPLETIONS, body)
        async with asyncio.timeout(2):
            while live:
                await asyncio.sleep(0.01)
    finally:
        stats._on_step = on_step
        gc.enable()


async def test_several_prompts_in_one_request_are_answered_from_the_start(pair):
    body = request(COMPLETIONS, {"prompt": [PROMPT, "It was"], "stream": False, "max_tokens": 200})
    undisturbed = json.loads(await pair.ask(COMPLETIONS, body))
    task = asyncio.create_task(pair.ask(COMPLETIONS, body))
    await asyncio.sleep(0.3)
    await pair.cut()
    assert json.loads(await task)["choices"] == undisturbed["choices"]
