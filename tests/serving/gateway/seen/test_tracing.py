"""What a real OTLP receiver gets of a request, and what engines are told of its trace."""

import asyncio
import contextlib
import gzip
import re
import sys
from types import SimpleNamespace

import httpx
import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

from serving.config import ConfigError, TracingConfig, parse
from serving.gateway.observe.observer import Observer
from serving.gateway.observe.tracing import Tracing
from tests.support.running_gateway import CHAT, free_port, running

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Receiver:
    """An OTLP receiver over HTTP that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict] = []

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        if request.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        for each in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resources.append(values(each.resource.attributes))
            for scope in each.scope_spans:
                self.spans += scope.spans
        return web.Response(
            body=ExportTraceServiceResponse().SerializeToString(),
            content_type="application/x-protobuf",
        )

    def named(self, start: str) -> list[Span]:
        return [span for span in self.spans if span.name.startswith(start)]


def values(attributes) -> dict:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@contextlib.asynccontextmanager
async def receiving():
    """A receiver, and the configuration to send to it."""
    receiver, port = Receiver(), free_port()
    app = web.Application()
    app.router.add_post("/v1/traces", receiver.take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield receiver, {"endpoint": f"http://127.0.0.1:{port}/v1/traces"}
    finally:
        await runner.cleanup()


async def sent(system) -> None:
    """Return when all spans that are over have been sent."""
    processor = system.gateway.observer._tracing._processor
    assert await asyncio.to_thread(processor.force_flush)


async def test_the_spans_of_a_request(monkeypatch):
    monkeypatch.setattr("serving.gateway.observe.tracing._HELD_S", 0.0)
    async with receiving() as (receiver, config), running(num_engines=1, tracing=config) as system:
        forwarded = []
        app = system.engines[0].app

        async def noting(scope, receive, send):
            forwarded.append(dict(scope["headers"]))
            await app(scope, receive, send)

        monkeypatch.setattr(system.engines[0], "app", noting)
        reply = await system.client.post(
            CHAT,
            json=system.chat(max_tokens=3),
            headers={
                "traceparent": f"00-{TRACE}-{PARENT}-01",
                "tracestate": "a=b",
                "x-headway-class": "interactive",
            },
        )
        assert reply.status_code == 200
        await sent(system)
        [span] = receiver.named("chat fake-model")
        [hold] = receiver.named("hold")
        [run] = receiver.named("run r0")
    assert len(receiver.spans) == 3
    assert {each.trace_id.hex() for each in receiver.spans} == {TRACE}
    assert span.parent_span_id.hex() == PARENT
    assert hold.parent_span_id == run.parent_span_id == span.span_id
    assert (span.kind, hold.kind, run.kind) == (
        Span.SPAN_KIND_SERVER,
        Span.SPAN_KIND_INTERNAL,
        Span.SPAN_KIND_CLIENT,
    )
    # In the order of things, and within the request.
    [first] = run.events
    assert first.name == "gen_ai.first_token"
    assert (
        span.start_time_unix_nano - 10**6
        <= hold.start_time_unix_nano
        <= hold.end_time_unix_nano
        <= run.start_time_unix_nano + 10**6
        <= first.time_unix_nano + 2 * 10**6
        <= run.end_time_unix_nano + 3 * 10**6
        <= span.end_time_unix_nano + 4 * 10**6
    )
    told = values(span.attributes)
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "headway",
        "gen_ai.request.model": "fake-model",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.stream": True,
        "http.response.status_code": 200,
        "url.path": CHAT,
        "headway.class": "interactive",
        "headway.outcome": "completed",
    }
    assert values(run.attributes)["headway.predicted_time_to_first_token"] > 0
    assert span.status.code == Status.STATUS_CODE_UNSET
    [resource] = receiver.resources
    assert (resource["service.name"], resource["service.instance.id"]) == ("headway", "gateway")
    # The engine's own span will be a child of this one.
    [headers] = forwarded
    expected = f"00-{TRACE}-{span.span_id.hex()}-01"
    assert headers[b"traceparent"] == expected.encode()
    assert headers[b"tracestate"] == b"a=b"


async def test_one_without_a_parent_begins_a_trace_which_the_log_names(tmp_path):
    async with (
        receiving() as (receiver, config),
        running(num_engines=1, tracing=config, log={"dir": str(tmp_path)}) as system,
    ):
        await system.client.post(CHAT, json=system.chat())
        await sent(system)
        path = tmp_path / "requests-0.log"
        await system.until(lambda: path.read_text())
    [span] = receiver.named("chat")
    assert span.parent_span_id == b""
    assert re.search('"trace_id":"(.*?)"', path.read_text())[1] == span.trace_id.hex()


async def test_one_that_its_client_does_not_sample_is_passed_on_and_not_sent(monkeypatch):
    async with receiving() as (receiver, config), running(num_engines=1, tracing=config) as system:
        forwarded = []
        app = system.engines[0].app

        async def noting(scope, receive, send):
            forwarded.append(dict(scope["headers"])[b"traceparent"].decode())
            await app(scope, receive, send)

        monkeypatch.setattr(system.engines[0], "app", noting)
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
        await system.client.post(CHAT, json=system.chat(), headers=headers)
        await sent(system)
    assert receiver.spans == []
    assert [each[:36] + each[-3:] for each in forwarded] == [f"00-{TRACE}--00"]


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "nonsense",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}",
    ],
)
async def test_a_parent_that_is_none_begins_a_trace(traceparent):
    async with receiving() as (receiver, config), running(num_engines=1, tracing=config) as system:
        headers = {"traceparent": traceparent, "tracestate": "a=b"}
        reply = await system.client.post(CHAT, json=system.chat(), headers=headers)
        assert reply.status_code == 200
        await sent(system)
    [span] = receiver.named("chat")
    assert span.trace_id.hex() != TRACE
    assert (span.parent_span_id, span.trace_state) == (b"", "")


async def test_a_share_is_sampled_by_the_trace_s_id():
    config = TracingConfig(endpoint="http://127.0.0.1:1", sample_ratio=0.25)
    tracing = Tracing(config, "g", 0)
    sampled = 0
    for _ in range(2000):
        exchange = SimpleNamespace(headers=[])
        span = tracing.begin(exchange, [])
        by_library = TraceIdRatioBased(0.25).should_sample(None, span.trace, "")
        assert span.is_sampled == by_library.decision.is_sampled()
        assert exchange.headers[0][1].endswith(b"1" if span.is_sampled else b"0")
        sampled += span.is_sampled
    assert 400 < sampled < 600
    tracing.close()


async def test_nothing_is_sampled_at_a_ratio_of_nothing():
    async with receiving() as (receiver, config):
        async with running(tracing={**config, "sample_ratio": 0}) as system:
            await system.client.post(CHAT, json=system.chat())
            await sent(system)
        assert receiver.spans == []


async def test_an_engine_that_is_lost_and_a_client_that_leaves():
    async with receiving() as (receiver, config), running(num_engines=3, tracing=config) as system:
        for engine in system.engines:
            engine.gate.clear()
        asking = asyncio.create_task(system.client.post(CHAT, json=system.chat()))
        await system.until(lambda: system.num_engine_streams == 1)
        next(server for server in system.servers if server.num_streams).close()
        await system.until(lambda: system.gateway.state().retries.num_made == 1)
        for engine in system.engines:
            engine.gate.set()
        assert (await asking).status_code == 200
        for engine in system.engines:
            engine.gate.clear()
        with pytest.raises(httpx.ReadTimeout):
            await system.client.post(CHAT, json=system.chat(), timeout=0.2)
        await system.until(lambda: not system.gateway.driver.exchanges)
        await asyncio.sleep(0.05)
        await sent(system)
        answered, left = receiver.named("chat")
    runs = [each for each in receiver.named("run") if each.parent_span_id == answered.span_id]
    assert len({each.name for each in runs}) == 2
    assert [len(each.events) for each in sorted(runs, key=lambda r: r.start_time_unix_nano)] == [
        0,
        1,
    ]
    told = values(left.attributes)
    assert (told["headway.outcome"], told["error.type"]) == ("reneged", "the client left")
    assert left.status.code == Status.STATUS_CODE_ERROR


async def test_a_receiver_that_is_not_there_stops_nobody():
    endpoint = f"http://127.0.0.1:{free_port()}/v1/traces"
    async with running(num_engines=1, tracing={"endpoint": endpoint}) as system:
        for _ in range(3):
            assert (await system.client.post(CHAT, json=system.chat())).status_code == 200
        start_s = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - start_s < 5  # and nothing waits at the end


async def test_it_is_off_unless_asked_for_and_then_nothing_of_it_is_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    for name in ("otlp", "tracing"):
        monkeypatch.delitem(sys.modules, f"serving.gateway.observe.{name}", raising=False)
    async with running(num_engines=1) as system:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        reply = await system.client.post(CHAT, json=system.chat(), headers=headers)
        assert reply.status_code == 200
        assert system.gateway.observer._tracing is None
    with pytest.raises(ConfigError, match=r"tracing\.endpoint needs OpenTelemetry"):
        Observer(parse({"tracing": {"endpoint": "http://127.0.0.1:1"}}), "g", 0, None)
