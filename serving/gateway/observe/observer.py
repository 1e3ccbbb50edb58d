"""Who is told of each request when it is over? Metrics, the request log, the tracer."""

import time
from typing import TYPE_CHECKING

from starlette.types import Scope

from router import Outcome
from serving.config import Config, ConfigError, TracingConfig
from serving.gateway.exchange import Exchange
from serving.gateway.http.errors import ApiError
from serving.gateway.http.own_headers import request_id_of
from serving.gateway.observe.metrics.requests import Metrics
from serving.gateway.observe.request_log import Clock, RequestLine, RequestLog
from serving.stream.frames import Headers

if TYPE_CHECKING:
    from serving.gateway.observe.tracing import Tracing


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
            self._log.write(self._line(scope, exchange, tenant, status, error))
        if self._tracing is not None and exchange is not None and exchange.journey.span is not None:
            outcome, reason = _end_of(exchange, status, error)
            self._tracing.end(exchange.journey.span, exchange, status, outcome, reason)

    def _line(
        self,
        scope: Scope,
        exchange: Exchange | None,
        tenant: str,
        status: int,
        error: Exception | None,
    ) -> RequestLine:
        now = self._clock.text(time.time())
        if exchange is None:
            return RequestLine(
                time=now,
                gateway=self._rank,
                id=request_id_of(scope),
                path=scope["path"],
                status=status,
                outcome=_outcome_of_reply(status),
                reason=reason_of(error),
                tenant=tenant,
            )
        request, journey, usage = exchange.request, exchange.journey, exchange.usage
        arrival_s = request.arrival_s
        outcome, reason = _end_of(exchange, status, error)
        is_stream = exchange.fields.is_stream
        first_s = journey.first_token_s if is_stream else 0.0
        took_s = journey.answered_in_s if first_s else None
        tpot_s = None
        if first_s and usage is not None:
            tpot_s = journey.time_per_token_s(usage.num_output_tokens, request.num_sequences)
        return RequestLine(
            time=now,
            gateway=self._rank,
            id=request_id_of(scope),
            path=exchange.path,
            status=status,
            outcome=outcome,
            reason=reason,
            model=request.model,
            route=journey.chosen.route if journey.chosen is not None else "",
            why=journey.chosen.why if journey.chosen is not None else "",
            tenant=tenant,
            request_class=request.priority_class._value_,
            stream=is_stream,
            cache=journey.cache,
            engines=tuple(place for place, _ in journey.places),
            held_s=_rounded(journey.places[0][1] - arrival_s) if journey.places else None,
            predicted_ttft_s=_rounded(journey.predicted_ttft_s) if first_s else None,
            answered_in_s=_rounded(took_s),
            ttft_s=_rounded(first_s - arrival_s) if first_s else None,
            tpot_s=_rounded(tpot_s),
            total_s=_rounded((journey.over_s or time.monotonic()) - arrival_s),
            prompt_tokens=usage.num_prompt_tokens if usage is not None else None,
            cached_tokens=usage.num_cached_tokens if usage is not None else None,
            output_tokens=usage.num_output_tokens if usage is not None else None,
            trace_id=journey.span.trace_id if journey.span is not None else "",
            body=exchange.body.decode(errors="replace") if self._has_bodies else "",
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


def _end_of(exchange: Exchange, status: int, error: Exception | None) -> tuple[str, str]:
    """Return how a request ended, and why if that was not well."""
    journey = exchange.journey
    outcome = journey.outcome
    said = outcome._value_ if outcome is not None else _outcome_of_reply(status)
    return said, _without_details(journey.reason) if journey.reason else reason_of(error)


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
