"""A span's bytes say what the library's own encoder would say of it."""

from types import SimpleNamespace

import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.trace import SpanKind, TraceState

from serving.gateway.observe.otlp import Exporter, SpanData, readable

RESOURCE = Resource.create({"service.name": "headway", "headway.gateway": 3})
TRACE, OWN, REMOTE = 2**127 + 5, 2**63 + 1, 7
STATE = TraceState([("a", "b"), ("c", "d")])
SPANS = [
    SpanData(
        TRACE,
        OWN,
        REMOTE,
        "chat größer",
        SpanKind.SERVER,
        1_700_000_000_000_000_001,
        1_700_000_001_000_000_002,
        # Each is kept encoded, and none is taken for another: 1 for true, 0 for nothing.
        {"a": "x" * 300, "b": True, "c": 1, "d": 1.0, "e": 0, "f": "", "g": 0.0, "h": -1},
        error="the engine died",
        is_parent_remote=True,
        state=STATE,
    ),
    SpanData(TRACE, 9, OWN, "run r0", SpanKind.CLIENT, 5, 6, {"d": 0.25}, ("first", 6)),
    SpanData(TRACE, 9, None, "hold", SpanKind.INTERNAL, 5, 6, {}),
    SpanData(TRACE, 9, OWN, "run " * 80, SpanKind.CLIENT, 5, 6, {"b": 1, "c": True}, error=""),
]


def exporter(**library):
    """One whose traces are lists of spans."""
    return Exporter(SimpleNamespace(**library), RESOURCE, iter)


def parsed(data):
    request = ExportTraceServiceRequest.FromString(data)
    for span in request.resource_spans[0].scope_spans[0].spans:
        span.status.SetInParent()  # which the library does where it has nothing to say
    return request


@pytest.mark.parametrize("number", [1, 4, 40, 400])
def test_it_is_what_the_library_says(number):
    spans = (SPANS * 100)[:number]
    ours = exporter().encode([spans[:1], spans[1:]])
    assert parsed(ours) == encode_spans([readable(span, RESOURCE) for span in spans])


def test_the_library_sends_it_and_says_whether_it_was_taken():
    sent = []

    def send(data):
        sent.append(data)
        return SimpleNamespace(success=len(sent) == 1)

    sending = exporter(_client=SimpleNamespace(export=send))
    assert sending.export([SPANS]) is SpanExportResult.SUCCESS
    assert sending.export([SPANS]) is SpanExportResult.FAILURE
    assert sent == [sending.encode([SPANS])] * 2


def test_a_version_that_sends_otherwise_gets_spans_of_its_own():
    got = []
    exporter(export=got.append).export([SPANS])
    assert parsed(exporter().encode([SPANS])) == encode_spans(got[0])
