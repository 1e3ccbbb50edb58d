"""Which bytes does an OTLP receiver get of our spans?

OpenTelemetry's own encoder takes 55 µs a span (1.45, Python 3.11, a Xeon), ten times as long as
all else that a trace takes of a request, in a thread that shares Python with the gateway's. Most
of that is for attributes, nearly all of which were encoded before: a model's name, a path, a number
of tokens. So these are kept, and put together: parts of a message in protobuf's encoding, one after
the other, are the message. What is sent, and how often, is the library's business.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1 import resource_pb2
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.util import instrumentation
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode

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
_MAX_KEPT = 4096  # attributes that are kept encoded, some 100 bytes each
# Numbers of fields in opentelemetry-proto 1: they never change.
_RESOURCE_SPANS = 1  # of a request
_SCOPE_SPANS = 2  # of `ResourceSpans`
_SPANS = 2  # of `ScopeSpans`


class SpanData(NamedTuple):
    """A span that is over."""

    context: SpanContext
    parent: SpanContext | None
    name: str
    kind: SpanKind
    start_ns: int
    end_ns: int
    attributes: Attributes
    event: tuple[str, int] | None = None  # its name, and when
    error: str | None = None  # why it failed, in a word; None if it did not


class Exporter(SpanExporter):
    """Sends spans of one resource as a library's exporter sends its own."""

    def __init__(self, library: OTLPSpanExporter, resource: Resource) -> None:
        self._library = library
        self._resource = resource
        told = [_key_value(key, value) for key, value in resource.attributes.items()]  # type: ignore[arg-type]
        self._head = trace_pb2.ResourceSpans(
            resource=resource_pb2.Resource(attributes=told), schema_url=resource.schema_url
        ).SerializeToString()
        scope = trace_pb2.ScopeSpans(scope=InstrumentationScope(name=SCOPE))
        self._scope = scope.SerializeToString()

    def export(self, spans: Sequence[SpanData]) -> SpanExportResult:  # type: ignore[override]
        """Send spans. Return whether the receiver took them."""
        client = getattr(self._library, "_client", None)  # what sends bytes, in 1.45
        if client is None:  # another version's
            return self._library.export([readable(span, self._resource) for span in spans])
        is_taken = client.export(self.encode(spans)).success
        return SpanExportResult.SUCCESS if is_taken else SpanExportResult.FAILURE

    def shutdown(self) -> None:
        """Send no more."""
        self._library.shutdown()

    def encode(self, spans: Sequence[SpanData]) -> bytes:
        """Return an `ExportTraceServiceRequest`."""
        scope_spans = self._scope + b"".join([_field(_SPANS, _encode(span)) for span in spans])
        return _field(_RESOURCE_SPANS, self._head + _field(_SCOPE_SPANS, scope_spans))


def readable(span: SpanData, resource: Resource) -> ReadableSpan:
    """Return the span as the library has it."""
    is_error = span.error is not None
    return ReadableSpan(
        span.name,
        span.context,
        span.parent,
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
    context, parent = span.context, span.parent
    state = context.trace_state
    told = trace_pb2.Span(
        trace_id=context.trace_id.to_bytes(16, "big"),
        span_id=context.span_id.to_bytes(8, "big"),
        trace_state=state.to_header() if state else "",
        parent_span_id=b"" if parent is None else parent.span_id.to_bytes(8, "big"),
        name=span.name,
        kind=_KINDS[span.kind],
        start_time_unix_nano=span.start_ns,
        end_time_unix_nano=span.end_ns,
        flags=_REMOTE if parent is not None and parent.is_remote else _HERE,
    )
    if span.event is not None:
        told.events.add(name=span.event[0], time_unix_nano=span.event[1])
    if span.error is not None:
        told.status.code = trace_pb2.Status.STATUS_CODE_ERROR
        told.status.message = span.error
    attributes = [
        _attribute(key, value) if isinstance(value, float) else _kept_attribute(key, value)
        for key, value in span.attributes.items()
    ]
    return told.SerializeToString() + b"".join(attributes)


def _attribute(key: str, value: Value) -> bytes:
    """Return a span's attribute, and nothing else of a span."""
    return trace_pb2.Span(attributes=[_key_value(key, value)]).SerializeToString()


_kept_attribute = functools.lru_cache(_MAX_KEPT, typed=True)(_attribute)


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
