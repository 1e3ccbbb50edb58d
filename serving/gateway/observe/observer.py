"""Who is told of each request when it is over? Metrics, the request log, the tracer."""

import functools
import time
from typing import TYPE_CHECKING, NamedTuple

from starlette.types import Scope

from router import Outcome, Request, Usage
from serving.config import Config, ConfigError, TracingConfig
from serving.gateway.exchange import Exchange
from serving.gateway.http.errors import ApiError
from serving.gateway.http.own_headers import request_id_of
from serving.gateway.observe.journey import Journey
from serving.gateway.observe.metrics.requests import Metrics
from serving.gateway.observe.request_log import Clock, RequestLine, RequestLog
from serving.stream.frames import Headers

if TYPE_CHECKING:
    from serving.gateway.observe.tracing import Tracing


class _Over(NamedTuple):
    """What is kept of a request that is over until its line is written: no body, unless wanted."""

    time_s: float  # since the epoch
    now_s: float  # at the same time, of the clock of its journey
    id: str
    path: str
    tenant: str
    status: int
    reason: str  # why it was refused, if it was
    request: Request | None  # None, as the next three, where it did not get that far
    journey: Journey | None
    usage: Usage | None
    is_stream: bool
    body: bytes


class Observer:
    """Tells of requests that are over to whoever is configured to hear of it."""

    def __init__(self, config: Config, gateway_id: str, rank: int, metrics: Metrics) -> None:
        """Raises `OSError` where the log cannot be opened, `ConfigError` without OpenTelemetry."""
        self._rank = rank
        self._metrics = metrics
        self._clock = Clock()
        self._has_bodies = config.log.bodies
        self._log: RequestLog | None = None
        if config.log.dir is not None and config.log.requests:
            self._log = RequestLog(config.log, rank)
        self._tracing = _make_tracing(config.tracing, gateway_id, rank)

    def on_asked(self, exchange: Exchange, headers: Headers) -> None:
        """Note the beginning of a request that can be placed, by its client's headers."""
        if self._tracing is not None:
            exchange.journey.span = self._tracing.begin(exchange, headers)

    def on_over(
        self,
        scope: Scope,
        exchange: Exchange | None,
        tenant: str,
        status: int,
        error: Exception | None,
    ) -> None:
        """Note the end of a request for a model.

        `exchange` is None where it did not get that far, `status` 0 where the client left before
        it had one, `error` what the client was told in place of an answer.
        """
        self._metrics.observe_reply(status)
        if self._log is not None:
            over = self._over(scope, exchange, tenant, status, reason_of(error))
            self._log.write(functools.partial(self._line, over), len(over.body))
        if self._tracing is not None and exchange is not None and exchange.journey.span is not None:
            outcome, reason = _end_of(exchange.journey, status, reason_of(error))
            self._tracing.end(exchange.journey.span, exchange, status, outcome, reason)

    def _over(
        self, scope: Scope, exchange: Exchange | None, tenant: str, status: int, reason: str
    ) -> _Over:
        now_s, time_s, request_id = time.monotonic(), time.time(), request_id_of(scope)
        if exchange is None:
            nothing = (None, None, None, False, b"")
            return _Over(time_s, now_s, request_id, scope["path"], tenant, status, reason, *nothing)
        return _Over(
            time_s,
            now_s,
            request_id,
            exchange.path,
            tenant,
            status,
            reason,
            exchange.request,
            exchange.journey,
            exchange.usage,
            exchange.fields.is_stream,
            exchange.body if self._has_bodies else b"",
        )

    def _line(self, over: _Over) -> RequestLine:
        now = self._clock.text(over.time_s)
        request, journey, usage = over.request, over.journey, over.usage
        if request is None or journey is None:
            return RequestLine(
                time=now,
                gateway=self._rank,
                id=over.id,
                path=over.path,
                status=over.status,
                outcome=_outcome_of_reply(over.status),
                reason=over.reason,
                tenant=over.tenant,
            )
        arrival_s = request.arrival_s
        outcome, reason = _end_of(journey, over.status, over.reason)
        first_s = journey.first_token_s if over.is_stream else 0.0
        took_s = journey.answered_in_s if first_s else None
        tpot_s = None
        if first_s and usage is not None:
            tpot_s = journey.time_per_token_s(usage.num_output_tokens, request.num_sequences)
        return RequestLine(
            time=now,
            gateway=self._rank,
            id=over.id,
            path=over.path,
            status=over.status,
            outcome=outcome,
            reason=reason,
            model=request.model,
            route=journey.chosen.route if journey.chosen is not None else "",
            why=journey.chosen.why if journey.chosen is not None else "",
            tenant=over.tenant,
            request_class=request.priority_class._value_,
            stream=over.is_stream,
            cache=journey.cache,
            engines=tuple(place for place, _ in journey.places),
            held_s=_rounded(journey.places[0][1] - arrival_s) if journey.places else None,
            predicted_ttft_s=_rounded(journey.predicted_ttft_s) if first_s else None,
            answered_in_s=_rounded(took_s),
            ttft_s=_rounded(first_s - arrival_s) if first_s else None,
            tpot_s=_rounded(tpot_s),
            total_s=_rounded((journey.over_s or over.now_s) - arrival_s),
            prompt_tokens=usage.num_prompt_tokens if usage is not None else None,
            cached_tokens=usage.num_cached_tokens if usage is not None else None,
            output_tokens=usage.num_output_tokens if usage is not None else None,
            trace_id=journey.span.trace_id if journey.span is not None else "",
            body=over.body.decode(errors="replace"),
        )

    def close(self) -> None:
        """Write what has not been written yet."""
        if self._log is not None:
            self._log.close()
        if self._tracing is not None:
            self._tracing.close()


def _make_tracing(config: TracingConfig, gateway_id: str, rank: int) -> "Tracing | None":
    if config.endpoint is None:
        return None
    try:
        from serving.gateway.observe.tracing import Tracing  # late: only who traces needs it
    except ImportError as error:
        raise ConfigError(
            f"tracing.endpoint needs OpenTelemetry ({error}): pip install headway[tracing]"
        ) from None
    return Tracing(config, gateway_id, rank)


def _end_of(journey: Journey, status: int, reason: str) -> tuple[str, str]:
    """Return how a request ended, and why if that was not well; `reason`: it was refused for."""
    outcome = journey.outcome
    said = outcome._value_ if outcome is not None else _outcome_of_reply(status)
    return said, _without_details(journey.reason) if journey.reason else reason


def reason_of(error: Exception | None) -> str:
    """Return why a request was refused, in a word: messages may quote what was asked."""
    if isinstance(error, ApiError):
        return error.code if isinstance(error.code, str) else error.kind
    return type(error).__name__ if error is not None else ""


def _without_details(reason: str) -> str:
    """Return a failure without what an engine or provider said of it, which may quote a prompt."""
    return reason.partition(":")[0]


def _outcome_of_reply(status: int) -> str:
    """Return how a request ended that never came to the router."""
    if not status:
        return Outcome.RENEGED._value_
    return (Outcome.COMPLETED if status < 400 else Outcome.REJECTED)._value_


def _rounded(seconds: float | None) -> float | None:
    """Return microseconds' worth of a time: `round` takes ten times as long."""
    return None if seconds is None else int(seconds * 1e6 + 0.5) / 1e6
