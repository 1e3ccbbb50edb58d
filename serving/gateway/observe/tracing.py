"""Which spans does a request have? Its own, the time it was held, and each engine that had it.

By OpenTelemetry, in its conventions for generative AI. A request's ids are drawn when it arrives,
so that engines and their spans know it for their parent; its spans are made when it is over, of
what was noted of its way. They are plain tuples, which `serving.gateway.observe.otlp` encodes: a
`Tracer` times and guards what it is told of, for three times as much. Of requests that are not
sampled the ids are passed on.
"""

import threading
import time
from collections.abc import Callable

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.semconv.attributes import error_attributes, http_attributes, url_attributes
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from router import Outcome
from serving.config import TracingConfig
from serving.gateway.exchange import Exchange
from serving.gateway.observe.journey import RequestSpan
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
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_NOT_SAMPLED = TraceFlags(TraceFlags.DEFAULT)
_COMPLETED = Outcome.COMPLETED.value
_propagator = TraceContextTextMapPropagator()


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
        self._processor = BatchSpanProcessor(Exporter(OTLPSpanExporter(config.endpoint), resource))
        # It asks no more of a span than whether it is sampled.
        self._send: Callable[[SpanData], None] = self._processor.on_end  # type: ignore[assignment]
        self._sampled_below = TraceIdRatioBased.get_bound_for_rate(config.sample_ratio)
        self._ids = RandomIdGenerator()

    def begin(self, exchange: Exchange, headers: Headers) -> RequestSpan:
        """Begin a request's span, under its client's if it names one. Engines are told of it."""
        parent = _parent_in(headers)
        if parent is not None:
            trace_id, state, flags = parent.trace_id, parent.trace_state, parent.trace_flags
        else:
            trace_id, state = self._ids.generate_trace_id(), None
            is_sampled = trace_id & TraceIdRatioBased.TRACE_ID_LIMIT < self._sampled_below
            flags = _SAMPLED if is_sampled else _NOT_SAMPLED
        context = SpanContext(trace_id, self._ids.generate_span_id(), False, flags, state)
        if parent is not None:
            exchange.headers = [
                each for each in exchange.headers if each[0] not in _CONTEXT_HEADERS
            ]
            if state:
                exchange.headers.append((b"tracestate", state.to_header().encode("latin-1")))
        text = f"00-{trace_id:032x}-{context.span_id:016x}-{flags:02x}"
        exchange.headers.append((b"traceparent", text.encode()))
        return RequestSpan(context, parent)

    def end(
        self, span: RequestSpan, exchange: Exchange, status: int, outcome: str, reason: str
    ) -> None:
        """End a request's span, with those of its time held and of whoever had it."""
        if not span.context.trace_flags.sampled:
            return
        journey, arrival_s = exchange.journey, exchange.request.arrival_s
        over_s = journey.over_s or time.monotonic()
        # All its times by one reading of both clocks.
        epoch_ns = time.time_ns() - round(time.monotonic() * 1e9)
        if journey.places:
            sent_s = journey.places[0][1]
            if sent_s - arrival_s >= _HELD_S:
                self._send_child(span, "hold", SpanKind.INTERNAL, arrival_s, sent_s, epoch_ns, {})
            self._send_places(span, exchange, over_s, epoch_ns)
        attributes = _asked(exchange)
        attributes[http_attributes.HTTP_RESPONSE_STATUS_CODE] = status
        attributes["headway.outcome"] = outcome
        if journey.cache:
            attributes["headway.cache"] = journey.cache
        if (usage := exchange.usage) is not None:
            attributes[gen_ai.GEN_AI_USAGE_INPUT_TOKENS] = usage.num_prompt_tokens
            attributes[gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS] = usage.num_output_tokens
            if usage.num_cached_tokens:
                attributes[gen_ai.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS] = usage.num_cached_tokens
        error: str | None = None
        if outcome != _COMPLETED or status >= 500:
            attributes[error_attributes.ERROR_TYPE] = reason or str(status)
            if status == 0 or status >= 500:  # a client's own fault is no error of a server's span
                error = reason
        self._send(
            SpanData(
                span.context,
                span.parent,
                f"{attributes[gen_ai.GEN_AI_OPERATION_NAME]} {exchange.request.model}",
                SpanKind.SERVER,
                epoch_ns + round(arrival_s * 1e9),
                epoch_ns + round(over_s * 1e9),
                attributes,
                error=error,
            )
        )

    def _send_places(
        self, span: RequestSpan, exchange: Exchange, over_s: float, epoch_ns: int
    ) -> None:
        """Send a span for each engine or provider that had the request."""
        journey = exchange.journey
        ends = [sent_s for _, sent_s in journey.places[1:]]  # until another had it
        for number, (place, sent_s) in enumerate(journey.places):
            end_s = ends[number] if number < len(ends) else over_s
            event = None
            attributes: Attributes = {"headway.engine": place}
            if place == journey.answered_by and sent_s <= journey.first_token_s <= end_s:
                first_ns = epoch_ns + round(journey.first_token_s * 1e9)
                event = ("gen_ai.first_token", first_ns)
                if journey.predicted_ttft_s is not None:
                    attributes["headway.predicted_time_to_first_token"] = journey.predicted_ttft_s
            name = f"run {place}"
            self._send_child(
                span, name, SpanKind.CLIENT, sent_s, end_s, epoch_ns, attributes, event
            )

    def _send_child(
        self,
        span: RequestSpan,
        name: str,
        kind: SpanKind,
        start_s: float,
        end_s: float,
        epoch_ns: int,
        attributes: Attributes,
        event: tuple[str, int] | None = None,
    ) -> None:
        of = span.context
        self._send(
            SpanData(
                SpanContext(of.trace_id, self._ids.generate_span_id(), False, of.trace_flags),
                of,
                name,
                kind,
                epoch_ns + round(start_s * 1e9),
                epoch_ns + round(end_s * 1e9),
                attributes,
                event,
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


def _operation(path: str) -> str:
    return _OPERATIONS.get(path) or path.rpartition("/")[2]


def _asked(exchange: Exchange) -> Attributes:
    request = exchange.request
    attributes: Attributes = {
        gen_ai.GEN_AI_OPERATION_NAME: _operation(exchange.path),
        gen_ai.GEN_AI_PROVIDER_NAME: "headway",
        gen_ai.GEN_AI_REQUEST_MODEL: request.model,
        gen_ai.GEN_AI_REQUEST_STREAM: exchange.fields.is_stream,
        url_attributes.URL_PATH: exchange.path,
        "headway.class": request.priority_class._value_,
    }
    if request.max_output_tokens is not None:
        attributes[gen_ai.GEN_AI_REQUEST_MAX_TOKENS] = request.max_output_tokens
    if request.num_sequences > request.num_prompts:
        choices = request.num_sequences // request.num_prompts
        attributes[gen_ai.GEN_AI_REQUEST_CHOICE_COUNT] = choices
    if request.tenant:
        attributes["headway.tenant"] = request.tenant
    return attributes
