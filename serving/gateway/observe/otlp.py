"""Which bytes does an OTLP receiver get of our spans?

OpenTelemetry's own encoder takes 55 µs a span (1.45, Python 3.11, a Xeon), ten times as long as
all else that a trace takes of a request, in a thread that shares Python with the gateway's. Most
of that is for attributes, nearly all of which were encoded before: a model's name, a path, a number
of tokens. So these are kept, and put together: parts of a message in protobuf's encoding, one after
the other, are the message. The rest of a span is of a few fields, whose numbers never change. What
is sent, and how often, is the library's business.
"""

import functools
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1 import resource_pb2
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.util import instrumentation
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

_Trace = TypeVar("_Trace")
Value = str | int | float | bool
Attributes = dict[str, Value]

SCOPE = "headway"
_KINDS = {
    SpanKind.INTERNAL: trace_pb2.Span.SPAN_KIND_INTERNAL,
    SpanKind.SERVER: trace_pb2.Span.SPAN_KIND_SERVER,
    SpanKind.CLIENT: trace_pb2.Span.SPAN_KIND_CLIENT,
}
_HERE = trace_pb2.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK  # its parent is ours, or there is none
_REMOTE = _HERE | trace_pb2.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK
_MAX_KEPT = 4096  # attributes and names that are kept encoded, some 100 bytes each
_MAX_AT_ONCE = 16  # traces, before whoever serves requests may go on: 0.3 ms
# Numbers of fields in opentelemetry-proto 1: they never change.
_RESOURCE_SPANS = 1  # of a request
_SCOPE_SPANS = 2  # of `ResourceSpans`
_SPANS = 2  # of `ScopeSpans`
_TRACE_STATE, _PARENT_SPAN_ID, _NAME, _EVENTS, _STATUS = 3, 4, 5, 11, 15  # of `Span`
_EVENT_NAME = 2  # of `Span.Event`
_MESSAGE = 2  # of `Status`
_IS_ERROR = bytes((3 << 3, trace_pb2.Status.STATUS_CODE_ERROR))  # `Status.code`
# A field's tag, which tells its number and kind, before each value: trace_id and span_id (with
# their lengths), start_time_unix_nano and end_time_unix_nano, flags, and kind.
_FIXED = struct.Struct("<2s16s2s8sBQBQ2sIBB")
_FLOAT = struct.Struct("<d")
_TIME = struct.Struct("<BQ")  # `Span.Event.time_unix_nano`


class SpanData(NamedTuple):
    """A span that is over."""

    trace: int  # 128 bits
    id: int  # 64 bits
    parent: int | None  # a span's id; None: it has none
    name: str
    kind: SpanKind
    start_ns: int
    end_ns: int
    attributes: Attributes
    event: tuple[str, int] | None = None  # its name, and when
    error: str | None = None  # why it failed, in a word; None if it did not
    is_parent_remote: bool = False
    state: TraceState | None = None


class Exporter(SpanExporter, Generic[_Trace]):
    """Sends spans of one resource as a library's exporter sends its own.

    What it is given are traces: all spans of a request together, which are made here, in the
    thread of whoever sends. One after the other that takes a quarter of what it takes while
    requests are served, each with all that it needs out of the processor's caches.
    """

    def __init__(
        self,
        library: OTLPSpanExporter,
        resource: Resource,
        spans_of: Callable[[_Trace], Iterable[SpanData]],
    ) -> None:
        self._library = library
        self._spans_of = spans_of
        self._resource = resource
        told = [_key_value(key, value) for key, value in resource.attributes.items()]  # type: ignore[arg-type]
        self._head = trace_pb2.ResourceSpans(
            resource=resource_pb2.Resource(attributes=told), schema_url=resource.schema_url
        ).SerializeToString()
        scope = trace_pb2.ScopeSpans(scope=InstrumentationScope(name=SCOPE))
        self._scope = scope.SerializeToString()

    def export(self, traces: Sequence[_Trace]) -> SpanExportResult:  # type: ignore[override]
        """Send the spans of traces. Return whether the receiver took them."""
        client = getattr(self._library, "_client", None)  # what sends bytes, in 1.45
        if client is None:  # another version's
            spans = [span for trace in traces for span in self._spans_of(trace)]
            return self._library.export([readable(span, self._resource) for span in spans])
        is_taken = client.export(self.encode(traces)).success
        return SpanExportResult.SUCCESS if is_taken else SpanExportResult.FAILURE

    def shutdown(self) -> None:
        """Send no more."""
        self._library.shutdown()

    def encode(self, traces: Sequence[_Trace]) -> bytes:
        """Return an `ExportTraceServiceRequest`."""
        encoded, left = [self._scope], iter(traces)
        while some := list(islice(left, _MAX_AT_ONCE)):
            for trace in some:
                encoded += [_field(_SPANS, _encode(span)) for span in self._spans_of(trace)]
            time.sleep(0.0)  # gives the lock of Python away
        return _field(_RESOURCE_SPANS, self._head + _field(_SCOPE_SPANS, b"".join(encoded)))


def readable(span: SpanData, resource: Resource) -> ReadableSpan:
    """Return the span as the library has it."""
    is_error = span.error is not None
    flags, parent = TraceFlags(TraceFlags.SAMPLED), None
    if span.parent is not None:
        parent = SpanContext(span.trace, span.parent, span.is_parent_remote, flags)
    return ReadableSpan(
        span.name,
        SpanContext(span.trace, span.id, False, flags, span.state),
        parent,
        resource,
        span.attributes,
        [Event(span.event[0], {}, span.event[1])] if span.event is not None else (),
        kind=span.kind,
        status=Status(StatusCode.ERROR if is_error else StatusCode.UNSET, span.error),
        start_time=span.start_ns,
        end_time=span.end_ns,
        instrumentation_scope=instrumentation.InstrumentationScope(SCOPE),
    )


def _encode(span: SpanData) -> bytes:
    fixed = _FIXED.pack(
        *(b"\x0a\x10", span.trace.to_bytes(16, "big"), b"\x12\x08", span.id.to_bytes(8, "big")),
        *(0x39, span.start_ns, 0x41, span.end_ns),
        *(b"\x85\x01", _REMOTE if span.is_parent_remote else _HERE, 0x30, _KINDS[span.kind]),
    )
    parts = [fixed, _kept_text(_NAME, span.name)]
    if span.parent is not None:
        parts.append(_field(_PARENT_SPAN_ID, span.parent.to_bytes(8, "big")))
    if span.state:
        parts.append(_kept_text(_TRACE_STATE, span.state.to_header()))
    if span.event is not None:
        name, when_ns = span.event
        event = _TIME.pack(0x09, when_ns) + _kept_text(_EVENT_NAME, name)
        parts.append(_field(_EVENTS, event))
    if span.error is not None:
        message = _field(_MESSAGE, span.error.encode()) if span.error else b""
        parts.append(_field(_STATUS, message + _IS_ERROR))
    for key, value in span.attributes.items():
        if isinstance(value, float):  # which hardly comes again
            parts.append(_start_of_float(key) + _FLOAT.pack(value))
        else:
            parts.append(_kept_attribute(key, value))
    return b"".join(parts)


@functools.lru_cache(_MAX_KEPT, typed=True)
def _kept_attribute(key: str, value: Value) -> bytes:
    """Return a span's attribute, and nothing else of a span."""
    return trace_pb2.Span(attributes=[_key_value(key, value)]).SerializeToString()


@functools.lru_cache
def _start_of_float(key: str) -> bytes:
    """Return an attribute that is a number, up to that, which is last in it."""
    return _kept_attribute(key, 1.0)[: -_FLOAT.size]


def _key_value(key: str, value: Value) -> KeyValue:
    if isinstance(value, bool):
        return KeyValue(key=key, value=AnyValue(bool_value=value))
    if isinstance(value, int):
        return KeyValue(key=key, value=AnyValue(int_value=value))
    if isinstance(value, float):
        return KeyValue(key=key, value=AnyValue(double_value=value))
    return KeyValue(key=key, value=AnyValue(string_value=value))


def _field(number: int, data: bytes) -> bytes:
    """Return a field that holds a message."""
    head, length = [number << 3 | 2], len(data)
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes((*head, length)) + data


@functools.lru_cache(_MAX_KEPT)
def _kept_text(number: int, text: str) -> bytes:
    """Return a field that holds a text that comes again."""
    return _field(number, text.encode())
