"""Which spans does a request have? Its own, the time it was held, and each engine that had it.

By OpenTelemetry, in its conventions for generative AI. A request's ids are drawn when it arrives,
so that engines and their spans know it for their parent. When it is over what was noted of its way
is queued, and spans are made of that in the thread that sends them: see
`serving.gateway.observe.otlp`, which encodes them. They are plain tuples: a `Tracer` times and
guards what it is told of, for three times as much. Of requests that are not sampled the ids are
passed on.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.semconv.attributes import error_attributes, http_attributes, url_attributes
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from router import Outcome, Request, Usage
from serving.config import TracingConfig
from serving.gateway.exchange import Exchange
from serving.gateway.observe.journey import Journey, RequestSpan
from serving.gateway.observe.otlp import Attributes, Exporter, SpanData
from serving.stream.frames import Headers

_OPERATIONS = {  # by path; others are called by theirs
    "/v1/chat/completions": gen_ai.GenAiOperationNameValues.CHAT.value,
    "/v1/messages": gen_ai.GenAiOperationNameValues.CHAT.value,
    "/v1/responses": gen_ai.GenAiOperationNameValues.CHAT.value,
    "/v1/completions": gen_ai.GenAiOperationNameValues.TEXT_COMPLETION.value,
    "/v1/embeddings": gen_ai.GenAiOperationNameValues.EMBEDDINGS.value,
}
_CONTEXT_HEADERS = (b"traceparent", b"tracestate")
_HELD_S = 0.001  # a shorter time is that of deciding
_END_S = 1.0  # for the last spans to be sent
# A processor asks no more of what it is given than whether this is sampled.
_SAMPLED = SpanContext(1, 1, False, TraceFlags(TraceFlags.SAMPLED))
_COMPLETED = Outcome.COMPLETED.value
_propagator = TraceContextTextMapPropagator()
_LIMIT = TraceIdRatioBased.TRACE_ID_LIMIT
# Seeded by the system. An id of 0 would be none.
_random_bits = random.Random().getrandbits


class _Trace(NamedTuple):
    """What the spans of a request that is over are made of: not its body."""

    span: RequestSpan
    request: Request
    journey: Journey
    usage: Usage | None
    path: str
    is_stream: bool
    status: int
    outcome: str
    reason: str
    over_s: float  # of the monotonic clock, as are all times of the journey
    epoch_ns: int  # when that clock was at 0

    @property
    def context(self) -> SpanContext:
        return _SAMPLED


class Tracing:
    """Makes the spans of a gateway's requests and sends them from a thread of its own."""

    def __init__(self, config: TracingConfig, gateway_id: str, rank: int) -> None:
        resource = Resource.create(
            {
                "service.name": config.service_name,
                "service.instance.id": gateway_id,
                "headway.gateway": rank,
            }
        )
        exporter = Exporter(OTLPSpanExporter(config.endpoint), resource, _spans_of)
        self._processor = BatchSpanProcessor(exporter)
        self._send: Callable[[_Trace], None] = self._processor.on_end  # type: ignore[assignment]
        self._sampled_below = TraceIdRatioBased.get_bound_for_rate(config.sample_ratio)

    def begin(self, exchange: Exchange, headers: Headers) -> RequestSpan:
        """Begin a request's span, under its client's if it names one. Engines are told of it."""
        parent = _parent_in(headers)
        if parent is None:
            trace = _random_bits(128) or 1
            is_sampled = trace & _LIMIT < self._sampled_below
            flags = 1 if is_sampled else 0
        else:
            trace, flags = parent.trace_id, parent.trace_flags
            is_sampled = parent.trace_flags.sampled
            exchange.headers = [
                each for each in exchange.headers if each[0] not in _CONTEXT_HEADERS
            ]
            if parent.trace_state:
                state = parent.trace_state.to_header()
                exchange.headers.append((b"tracestate", state.encode("latin-1")))
        span = RequestSpan(trace, _random_bits(64) or 1, is_sampled, parent)
        exchange.headers.append((b"traceparent", b"00-%032x-%016x-%02x" % (trace, span.id, flags)))
        return span

    def end(
        self, span: RequestSpan, exchange: Exchange, status: int, outcome: str, reason: str
    ) -> None:
        """End a request's span, with those of its time held and of whoever had it."""
        if not span.is_sampled:
            return
        now_s = time.monotonic()
        self._send(
            _Trace(
                span,
                exchange.request,
                exchange.journey,
                exchange.usage,
                exchange.path,
                exchange.fields.is_stream,
                status,
                outcome,
                reason,
                exchange.journey.over_s or now_s,
                time.time_ns() - round(now_s * 1e9),  # both clocks read once for all its times
            )
        )

    def close(self) -> None:
        """Send what is left, for a second at most."""
        thread = threading.Thread(target=self._processor.shutdown, name="tracing", daemon=True)
        thread.start()
        thread.join(_END_S)


def _parent_in(headers: Headers) -> SpanContext | None:
    """Return the span that a client names as its own; None if it names none, or not rightly."""
    for name, _ in headers:
        if name == b"traceparent":
            break
    else:
        return None
    carrier = {
        name.decode(): value.decode("latin-1")
        for name, value in headers
        if name in _CONTEXT_HEADERS
    }
    context = get_current_span(_propagator.extract(carrier)).get_span_context()
    return context if context.is_valid else None


def _spans_of(trace: _Trace) -> Iterator[SpanData]:
    """Yield the spans of a request: while it was held, of whoever had it, and its own."""
    journey, arrival_s = trace.journey, trace.request.arrival_s
    if journey.places:
        sent_s = journey.places[0][1]
        if sent_s - arrival_s >= _HELD_S:
            yield _child(trace, "hold", SpanKind.INTERNAL, arrival_s, sent_s, {})
        yield from _places(trace)
    attributes = _attributes(trace)
    error: str | None = None
    if trace.outcome != _COMPLETED or trace.status >= 500:
        attributes[error_attributes.ERROR_TYPE] = trace.reason or str(trace.status)
        # A client's own fault is no error of a server's span.
        if trace.status == 0 or trace.status >= 500:
            error = trace.reason
    span = trace.span
    parent = span.parent
    yield SpanData(
        span.trace,
        span.id,
        None if parent is None else parent.span_id,
        f"{attributes[gen_ai.GEN_AI_OPERATION_NAME]} {trace.request.model}",
        SpanKind.SERVER,
        trace.epoch_ns + round(arrival_s * 1e9),
        trace.epoch_ns + round(trace.over_s * 1e9),
        attributes,
        error=error,
        is_parent_remote=parent is not None,
        state=None if parent is None else parent.trace_state,
    )


def _places(trace: _Trace) -> Iterator[SpanData]:
    """Yield a span for each engine or provider that had the request."""
    journey = trace.journey
    ends = [sent_s for _, sent_s in journey.places[1:]]  # until another had it
    for (place, sent_s), end_s in zip(journey.places, [*ends, trace.over_s], strict=True):
        event = None
        attributes: Attributes = {"headway.engine": place}
        if place == journey.answered_by and sent_s <= journey.first_token_s <= end_s:
            first_ns = trace.epoch_ns + round(journey.first_token_s * 1e9)
            event = ("gen_ai.first_token", first_ns)
            if journey.predicted_ttft_s is not None:
                attributes["headway.predicted_time_to_first_token"] = journey.predicted_ttft_s
        name = f"run {place}"
        yield _child(trace, name, SpanKind.CLIENT, sent_s, end_s, attributes, event)


def _child(
    trace: _Trace,
    name: str,
    kind: SpanKind,
    start_s: float,
    end_s: float,
    attributes: Attributes,
    event: tuple[str, int] | None = None,
) -> SpanData:
    """Return a span under the request's own."""
    return SpanData(
        trace.span.trace,
        _random_bits(64) or 1,
        trace.span.id,
        name,
        kind,
        trace.epoch_ns + round(start_s * 1e9),
        trace.epoch_ns + round(end_s * 1e9),
        attributes,
        event,
    )


def _operation(path: str) -> str:
    return _OPERATIONS.get(path) or path.rpartition("/")[2]


def _attributes(trace: _Trace) -> Attributes:
    """Return what a request's own span says of it."""
    request = trace.request
    attributes: Attributes = {
        gen_ai.GEN_AI_OPERATION_NAME: _operation(trace.path),
        gen_ai.GEN_AI_PROVIDER_NAME: "headway",
        gen_ai.GEN_AI_REQUEST_MODEL: request.model,
        gen_ai.GEN_AI_REQUEST_STREAM: trace.is_stream,
        url_attributes.URL_PATH: trace.path,
        "headway.class": request.priority_class._value_,
        http_attributes.HTTP_RESPONSE_STATUS_CODE: trace.status,
        "headway.outcome": trace.outcome,
    }
    if request.max_output_tokens is not None:
        attributes[gen_ai.GEN_AI_REQUEST_MAX_TOKENS] = request.max_output_tokens
    if request.num_sequences > request.num_prompts:
        choices = request.num_sequences // request.num_prompts
        attributes[gen_ai.GEN_AI_REQUEST_CHOICE_COUNT] = choices
    if request.tenant:
        attributes["headway.tenant"] = request.tenant
    if trace.journey.cache:
        attributes["headway.cache"] = trace.journey.cache
    if (usage := trace.usage) is not None:
        attributes[gen_ai.GEN_AI_USAGE_INPUT_TOKENS] = usage.num_prompt_tokens
        attributes[gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS] = usage.num_output_tokens
        if usage.num_cached_tokens:
            attributes[gen_ai.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS] = usage.num_cached_tokens
    return attributes
