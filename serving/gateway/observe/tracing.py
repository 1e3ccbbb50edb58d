"""Which spans does a request have? Its own, the time it was held, and each engine that had it.

By OpenTelemetry, in its conventions for generative AI. The request's span begins when it arrives,
so that engines and their spans know it for their parent; the others are made when it is over, of
what was noted of its way. Spans of requests that are not sampled are passed on, and no more.
"""

import threading
import time
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.semconv.attributes import error_attributes, http_attributes, url_attributes
from opentelemetry.trace import Context, Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from router import Outcome
from serving.config import TracingConfig
from serving.gateway.exchange import Exchange
from serving.stream.frames import Headers

_OPERATIONS = {  # by path; others are called by theirs
    "/v1/chat/completions": gen_ai.GenAiOperationNameValues.CHAT.value,
    "/v1/messages": gen_ai.GenAiOperationNameValues.CHAT.value,
    "/v1/responses": gen_ai.GenAiOperationNameValues.CHAT.value,
    "/v1/completions": gen_ai.GenAiOperationNameValues.TEXT_COMPLETION.value,
    "/v1/embeddings": gen_ai.GenAiOperationNameValues.EMBEDDINGS.value,
}
_CONTEXT_HEADERS = (b"traceparent", b"tracestate")
_END_S = 1.0  # for the last spans to be sent
_propagator = TraceContextTextMapPropagator()


class Tracing:
    """Makes the spans of a gateway's requests and sends them from a thread of its own."""

    def __init__(
        self,
        config: TracingConfig,
        gateway_id: str,
        rank: int,
        exporter: SpanExporter | None = None,
    ) -> None:
        """Without an `exporter`: OTLP over HTTP to the endpoint."""
        resource = Resource.create(
            {
                "service.name": config.service_name,
                "service.instance.id": gateway_id,
                "headway.gateway": rank,
            }
        )
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(config.sample_ratio),
            resource=resource,
            shutdown_on_exit=False,  # would wait for a receiver that does not answer
            span_limits=SpanLimits(max_events=16),
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter or OTLPSpanExporter(config.endpoint))
        )
        self._tracer = self._provider.get_tracer("headway")

    def begin(self, exchange: Exchange, headers: Headers) -> Span:
        """Begin a request's span, under its client's if it names one. Engines are told of it."""
        parent = Context()
        carrier = {
            name.decode(): value.decode("latin-1")
            for name, value in headers
            if name in _CONTEXT_HEADERS
        }
        if carrier:
            parent = _propagator.extract(carrier, parent)
        request = exchange.request
        operation = _operation(exchange.path)
        span = self._tracer.start_span(
            f"{operation} {request.model}",
            context=parent,
            kind=SpanKind.SERVER,
            start_time=_epoch_ns(request.arrival_s),
        )
        if span.is_recording():
            span.set_attributes(_asked(exchange, operation))
        injected: dict[str, str] = {}
        _propagator.inject(injected, set_span_in_context(span, parent))
        exchange.headers = [each for each in exchange.headers if each[0] not in _CONTEXT_HEADERS]
        exchange.headers += [(name.encode(), text.encode()) for name, text in injected.items()]
        return span

    def end(self, span: Span, exchange: Exchange, status: int, outcome: str, reason: str) -> None:
        """End a request's span, with those of its time held and of whoever had it."""
        if not span.is_recording():
            span.end()
            return
        journey, arrival_s = exchange.journey, exchange.request.arrival_s
        over_s = journey.over_s or time.monotonic()
        context = set_span_in_context(span, Context())
        if journey.places:
            self._child(context, "hold", SpanKind.INTERNAL, arrival_s, journey.places[0][1])
            self._add_places(context, exchange, over_s)
        attributes: dict[str, str | int | float] = {
            http_attributes.HTTP_RESPONSE_STATUS_CODE: status,
            "headway.outcome": outcome,
        }
        if journey.cache:
            attributes["headway.cache"] = journey.cache
        if (usage := exchange.usage) is not None:
            attributes[gen_ai.GEN_AI_USAGE_INPUT_TOKENS] = usage.num_prompt_tokens
            attributes[gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS] = usage.num_output_tokens
            attributes[gen_ai.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS] = usage.num_cached_tokens
        if outcome != Outcome.COMPLETED.value or status >= 500:
            attributes[error_attributes.ERROR_TYPE] = reason or str(status)
            if status == 0 or status >= 500:  # a client's own fault is no error of a server's span
                span.set_status(Status(StatusCode.ERROR, reason))
        span.set_attributes(attributes)
        span.end(_epoch_ns(over_s))

    def _add_places(self, context: Context, exchange: Exchange, over_s: float) -> None:
        """Add a span for each engine or provider that had the request."""
        journey = exchange.journey
        ends = [sent_s for _, sent_s in journey.places[1:]]  # until another had it
        for number, (place, sent_s) in enumerate(journey.places):
            has_answered = place == journey.answered_by and sent_s <= journey.first_token_s
            end_s = ends[number] if number < len(ends) else over_s
            events: list[tuple[str, float]] = []
            attributes: dict[str, str | float] = {"headway.engine": place}
            if has_answered and journey.first_token_s <= end_s:
                events.append(("gen_ai.first_token", journey.first_token_s))
                if journey.predicted_ttft_s is not None:
                    attributes["headway.predicted_time_to_first_token"] = journey.predicted_ttft_s
            self._child(context, f"run {place}", SpanKind.CLIENT, sent_s, end_s, attributes, events)

    def _child(
        self,
        context: Context,
        name: str,
        kind: SpanKind,
        start_s: float,
        end_s: float,
        attributes: dict[str, str | float] | None = None,
        events: Sequence[tuple[str, float]] = (),
    ) -> None:
        span = self._tracer.start_span(name, context, kind, attributes, (), _epoch_ns(start_s))
        for event, when_s in events:
            span.add_event(event, timestamp=_epoch_ns(when_s))
        span.end(_epoch_ns(end_s))

    def close(self) -> None:
        """Send what is left, for a second at most."""
        thread = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        thread.start()
        thread.join(_END_S)


def trace_id_of(span: Span) -> str:
    """Return the id of a span's trace, as `traceparent` has it."""
    return f"{span.get_span_context().trace_id:032x}"


def _operation(path: str) -> str:
    return _OPERATIONS.get(path) or path.rpartition("/")[2]


def _asked(exchange: Exchange, operation: str) -> dict[str, str | int | float]:
    request = exchange.request
    attributes: dict[str, str | int | float] = {
        gen_ai.GEN_AI_OPERATION_NAME: operation,
        gen_ai.GEN_AI_PROVIDER_NAME: "headway",
        gen_ai.GEN_AI_REQUEST_MODEL: request.model,
        gen_ai.GEN_AI_REQUEST_STREAM: exchange.fields.is_stream,
        http_attributes.HTTP_REQUEST_METHOD: exchange.method,
        url_attributes.URL_PATH: exchange.path,
        "headway.class": request.priority_class.value,
    }
    if request.max_output_tokens is not None:
        attributes[gen_ai.GEN_AI_REQUEST_MAX_TOKENS] = request.max_output_tokens
    if request.num_sequences > request.num_prompts:
        choices = request.num_sequences // request.num_prompts
        attributes[gen_ai.GEN_AI_REQUEST_CHOICE_COUNT] = choices
    if request.tenant:
        attributes["headway.tenant"] = request.tenant
    return attributes


def _epoch_ns(monotonic_s: float) -> int:
    """Return nanoseconds since the epoch for a time of the monotonic clock."""
    return time.time_ns() - round((time.monotonic() - monotonic_s) * 1e9)
