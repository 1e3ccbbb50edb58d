"""Who tells the router what happens, and does what it decides? The core's shell in a gateway."""

import asyncio
import logging
import math
import time
from collections.abc import Collection

from router import (
    Decision,
    Dispatch,
    Evacuate,
    Fail,
    Failure,
    Fallback,
    Hold,
    Outcome,
    Reject,
    RejectReason,
    Request,
    Router,
    Usage,
    Withdraw,
    carry_out,
)
from router.limits.rate_limit import RateReport
from router.queueing.deadline import engine_put_off_s
from router.resilience.resume import Records, Reply
from serving.config import Config
from serving.gateway.engines import Engines
from serving.gateway.exchange import Attempt, ClientLeft, EngineFailed, Exchange, Rejected, Turn
from serving.gateway.http.endpoints.kept import state_lost
from serving.gateway.http.errors import REMOVED, model_gone
from serving.gateway.observe.metrics.requests import Metrics
from serving.gateway.observe.recent import Recent
from serving.gateway.providers.calls import Providers
from serving.gateway.providers.http_client import ProviderFailed
from serving.stream.frames import Data, End, Head
from serving.stream.record import num_tokens

logger = logging.getLogger(__name__)

# Event loops count milliseconds, so a timer may ring a part of one too early.
_TIMER_GRAIN_S = 1e-3


class Driver:
    """Owns the clock, the timer and the open exchanges.

    Everything runs on one event loop and nothing here awaits between asking
    the router and doing what it says.
    """

    def __init__(
        self,
        router: Router,
        providers: Providers,
        metrics: Metrics,
        *,
        window_bytes: int,
        max_record_bytes: int,
    ) -> None:
        """`window_bytes`: what may be under way to a client that does not read."""
        self.router = router
        self.metrics = metrics
        self.turn = Turn()
        self.exchanges: dict[str, Exchange] = {}
        self.records = Records(max_record_bytes)
        self.engines = Engines(router, self)
        self._providers = providers
        self.recent = Recent(self.exchanges, router.state)
        self._ack_bytes = window_bytes // 2
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = math.inf  # when it rings

    # --- clients ---------------------------------------------------------

    def open(self, exchange: Exchange) -> None:
        """Place, hold or refuse a request that has arrived."""
        self.exchanges[exchange.request.id] = exchange
        exchange.is_open = True
        try:
            self.execute(self.router.on_arrival(exchange.request, time.monotonic()))
        except Exception as error:
            self.break_off(exchange, error)
            raise

    def cancel(self, exchange: Exchange) -> None:
        """End an exchange whose client has left. Do nothing if the response is complete.

        Many hang up at `[DONE]`, when the engine has yet to tell what the reply took.
        """
        if exchange.is_complete or self.exchanges.get(exchange.request.id) is not exchange:
            return
        self._abandon(exchange, ClientLeft("the client left"))

    def break_off(self, exchange: Exchange, error: Exception) -> None:
        """End an exchange that our own code failed on, so that nothing of it stays behind."""
        if self.exchanges.get(exchange.request.id) is exchange:
            self._providers.cancel_call(exchange)
            self._close(exchange, Outcome.RENEGED, error)
        try:
            self.execute(self.router.on_cancel(exchange.request.id, time.monotonic()))
        except Exception:
            logger.exception("request %s cannot be taken from the router", exchange.request.id)

    def acknowledge_bytes(self, exchange: Exchange, num_bytes: int) -> None:
        """Let whoever answers send more: the client has taken so much of the response."""
        if not exchange.attempts:
            self._providers.acknowledge_bytes(exchange, num_bytes)
            return
        attempt = exchange.attempts[0]
        attempt.num_taken_bytes += num_bytes
        if attempt.num_taken_bytes >= self._ack_bytes:
            self.engines.acknowledge_bytes(attempt, attempt.num_taken_bytes)
            attempt.num_taken_bytes = 0

    # --- people ----------------------------------------------------------

    def set_policy(self, name: str, ablate: Collection[str] = ()) -> None:
        """Switch the policy at once. Raise `ValueError` for an unknown name or part."""
        self.execute(self.router.set_policy(name, time.monotonic(), ablate))

    def use_providers(self, config: Config) -> None:
        """Go by this configuration's providers from now on; open calls go on as they began.

        Raises `ConfigError`, and changes nothing, if a key cannot be read or an extra
        is not installed.
        """
        self._providers.use_config(config)
        self.execute(
            self.router.providers.use(
                config.providers, config.fallback, time.monotonic(), self._providers.make_limiter
            )
        )

    # --- attempts at engines ----------------------------------------------

    def on_head(self, attempt: Attempt, frame: Head) -> None:
        exchange = attempt.exchange
        if frame.status >= 400 and self._fail_reply(attempt, frame.status):
            return
        attempt.head = frame
        if attempt.has_answered:  # with progress: it told what it generates before its head
            exchange.on_head(frame.status, frame.headers)

    def on_data(self, attempt: Attempt, frame: Data) -> None:
        if not attempt.has_answered:
            self._on_answer(attempt)
        exchange = attempt.exchange
        was_begun = exchange.reply.has_begun
        if exchange.reply.receive(frame.body, frame.record):
            now_s = time.monotonic()
            if exchange.status >= 400:
                pass  # an error is no first token
            elif not was_begun:
                self._note_first_token(exchange, attempt.replica_id, now_s)
            else:
                self.metrics.observe_resume(exchange.request, now_s - exchange.failed_s)
            self.execute(self.router.on_first_token(exchange.request.id, now_s))
        if frame.body:
            exchange.on_data(frame.body)

    def on_end(self, attempt: Attempt, frame: End) -> None:
        exchange = attempt.exchange
        if frame.error is not None:
            self.engines.end(attempt)
            self._fail_attempt(attempt, Failure.ERROR, frame.error, can_retry=frame.can_retry)
            return
        exchange.usage = frame.usage
        if not attempt.has_answered:
            self._on_answer(attempt)
        self.engines.end(attempt)
        self._complete(exchange)

    def on_attempt_lost(self, attempt: Attempt) -> None:
        self.engines.end(attempt)
        self._fail_attempt(attempt, None, "it was lost")

    def on_replica_lost(self, replica_id: str) -> None:
        """End what goes on from what only that engine kept."""
        for exchange in list(self.exchanges.values()):
            if exchange.request.only_at == replica_id:
                self.break_off(exchange, state_lost(exchange.fields))

    def on_model_gone(self, names: Collection[str], why: str = REMOVED) -> None:
        """End what waits for models that nobody is going to serve."""
        for exchange in list(self.exchanges.values()):
            model = exchange.request.model
            if model in names and model not in self._providers.models and not exchange.attempts:
                self.break_off(exchange, model_gone(model, why))

    def _on_answer(self, attempt: Attempt) -> None:
        """Give the exchange to the attempt that answers first, the only one from here on."""
        attempt.has_answered = True
        exchange = attempt.exchange
        if attempt.head is not None:
            exchange.on_head(attempt.head.status, attempt.head.headers)
        request_id, replica_id = exchange.request.id, attempt.replica_id
        exchange.replica_id = replica_id
        # Unless it was hedged nothing follows: once per request, so worth a look.
        if decisions := self.router.on_answer(request_id, replica_id, time.monotonic()):
            self.execute(decisions)

    def _note_first_token(self, exchange: Exchange, place: str, now_s: float) -> None:
        journey = exchange.journey
        journey.first_token_s, journey.answered_by = now_s, place
        journey.predicted_ttft_s = self.router.discipline.predicted_ttft_s(exchange.request.id)
        self.metrics.observe_first_token(exchange, now_s)

    def _fail_reply(self, attempt: Attempt, status: int) -> bool:
        """Report an error reply. Return whether the client is not to have it."""
        exchange = attempt.exchange
        decisions = self.router.failures.on_error_reply(
            exchange.request.id,
            attempt.replica_id,
            self._note_failure(exchange, f"it answered {status}"),
            status=status,
            can_retry=exchange.reply.can_go_on,
            has_begun=exchange.reply.has_begun,
            num_output_tokens=_count_new_tokens(exchange.reply),
        )
        self.execute(decisions)
        return bool(decisions)

    def _fail_attempt(
        self, attempt: Attempt, failure: Failure | None, words: str, *, can_retry: bool = True
    ) -> None:
        """Report that an engine did not carry the exchange through: another one may."""
        exchange = attempt.exchange
        self.execute(
            self.router.failures.on_attempt_failed(
                exchange.request.id,
                attempt.replica_id,
                failure,
                self._note_failure(exchange, words),
                can_retry=can_retry and exchange.reply.can_go_on,
                has_begun=exchange.reply.has_begun,
                num_output_tokens=_count_new_tokens(exchange.reply),
            )
        )

    def _note_failure(self, exchange: Exchange, words: str) -> float:
        """Note why its last attempt failed, and when, which is returned: now."""
        exchange.failure, exchange.failed_s = words, time.monotonic()
        return exchange.failed_s

    # --- calls to providers ------------------------------------------------

    def on_provider_answer(self, exchange: Exchange, report: RateReport) -> None:
        now_s = time.monotonic()
        self.execute(self.router.providers.on_answer(exchange.request.id, report, now_s))

    def on_provider_first_byte(self, exchange: Exchange) -> None:
        now_s = time.monotonic()
        if exchange.reply.has_begun:
            self.metrics.observe_resume(exchange.request, now_s - exchange.failed_s)
        else:
            self._note_first_token(exchange, exchange.journey.last_place, now_s)
        self.execute(self.router.on_first_token(exchange.request.id, now_s))

    def on_provider_refused(self, exchange: Exchange, report: RateReport) -> None:
        now_s = time.monotonic()
        self.execute(self.router.providers.on_refused(exchange.request.id, report, now_s))

    def on_provider_failed(self, exchange: Exchange, failed: ProviderFailed, words: str) -> None:
        now_s = self._note_failure(exchange, words)
        continuation = exchange.continuation
        self.execute(
            self.router.providers.on_failed(
                exchange.request.id,
                failed.failure,
                now_s,
                can_retry=not exchange.reply.has_begun,
                num_output_tokens=(
                    continuation.num_new_tokens
                    if continuation is not None and continuation.is_text
                    else None
                ),
                was_sent=failed.was_sent,
                lasts=failed.lasts,
                may_be_requests=failed.may_be_requests,
            )
        )

    def on_provider_complete(self, exchange: Exchange, usage: Usage | None) -> None:
        exchange.usage = usage
        self._complete(exchange)

    # --- decisions -------------------------------------------------------

    def execute(self, decisions: list[Decision]) -> None:
        """Carry out decisions of the router, then be called when it wants to be."""
        carry_out(decisions, self)
        self._providers.rearm_timer()
        wake_s = self.router.next_wake_s()
        # A timer that rings too early is set again then: cheaper than to set one per event.
        if wake_s is not None and wake_s < self._timer_s:
            self._set_timer(wake_s)

    def _set_timer(self, wake_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_s = wake_s
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.0, wake_s - time.monotonic()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer, self._timer_s = None, math.inf
        now_s, wake_s = time.monotonic(), self.router.next_wake_s()
        if wake_s is not None and wake_s <= now_s:
            self.execute(self.router.on_tick(now_s))
        elif wake_s is not None:
            self._set_timer(max(wake_s, now_s + _TIMER_GRAIN_S))

    def dispatch(self, decision: Dispatch) -> None:
        exchange = self.exchanges[decision.request_id]
        exchange.journey.places.append((decision.replica_id, time.monotonic()))
        priority = self._engine_priority(exchange.request)
        self.engines.submit(exchange, decision, priority, exchange.reply.resume())

    def withdraw(self, decision: Withdraw) -> None:
        self.engines.cancel(self.engines.get(decision.replica_id, decision.booking))

    def hold(self, decision: Hold) -> None:
        """Note why, and do nothing: the exchange waits as it is."""
        self.recent.on_hold(self.exchanges[decision.request_id], time.monotonic())

    def fall_back(self, decision: Fallback) -> None:
        exchange = self.exchanges[decision.request_id]
        exchange.was_sent = True
        exchange.journey.places.append((f"provider {decision.provider}", time.monotonic()))
        self._providers.start_call(exchange, decision, self)

    def reject(self, decision: Reject) -> None:
        exchange, reason = self.exchanges[decision.request_id], decision.reason
        outcome = Outcome.EXPIRED if reason is RejectReason.EXPIRED else Outcome.REJECTED
        self._close(exchange, outcome, Rejected(reason, decision.retry_after_s))

    def fail(self, decision: Fail) -> None:
        exchange = self.exchanges[decision.request_id]
        self._close(exchange, Outcome.FAILED, EngineFailed(exchange.failure))

    def evacuate(self, decision: Evacuate) -> None:
        logger.warning("engine %s is left: %s", decision.replica_id, decision.reason)
        for attempt in self.engines.at_replica(decision.replica_id):
            self.engines.cancel(attempt)
            self._fail_attempt(attempt, None, f"it is {decision.reason}")

    def _engine_priority(self, request: Request) -> int:
        """Return vLLM's priority: when the first token is due, in ms since the epoch.

        By the wall clock, as requests of several gateways meet in one engine.
        """
        due_s = self.router.discipline.engine_priority_s(request)
        if due_s is None:
            return round(engine_put_off_s(request) * 1000)
        return round((time.time() + due_s - time.monotonic()) * 1000)

    # --- ends ------------------------------------------------------------

    def _complete(self, exchange: Exchange) -> None:
        """End an exchange that was answered."""
        now_s = time.monotonic()
        self._close(exchange, Outcome.COMPLETED)
        self.execute(self.router.on_finish(exchange.request.id, exchange.usage, now_s))

    def _abandon(self, exchange: Exchange, error: Exception) -> None:
        """End an exchange that needs no answer any more, wherever it is."""
        self._providers.cancel_call(exchange)
        self._close(exchange, Outcome.RENEGED, error)
        usage = exchange.usage_taken()
        self.execute(self.router.on_cancel(exchange.request.id, time.monotonic(), usage))

    def _close(self, exchange: Exchange, outcome: Outcome, error: Exception | None = None) -> None:
        """Forget an exchange; engines that still have it are told to stop."""
        del self.exchanges[exchange.request.id]
        journey = exchange.journey
        journey.outcome, journey.over_s = outcome, time.monotonic()
        if error is not None:
            journey.reason = str(error)
        self.metrics.observe_end(exchange)
        for attempt in list(exchange.attempts):
            self.engines.cancel(attempt)
        exchange.on_end(error)

    def close(self) -> None:
        """Leave: end what is open, close every connection."""
        for exchange in list(self.exchanges.values()):
            self._abandon(exchange, EngineFailed("the gateway stops"))
        if self._timer is not None:
            self._timer.cancel()
        self._providers.close()
        self.engines.close()


def _count_new_tokens(reply: Reply) -> int:
    """Return how many tokens of a reply have been generated since they were last counted."""
    return reply.count_new_tokens(num_tokens(reply.record))
