"""Carries out the router's decisions: the shell around the core, in a gateway."""

import asyncio
import logging
import time
from collections.abc import Collection, Mapping

from router.core.router import Router
from router.resilience.breaker import Failure
from router.resilience.resume import Records, Reply, Resume
from router.types import (
    BlockUpdate,
    Decision,
    Dispatch,
    EngineInfo,
    EngineSnapshot,
    Evacuate,
    Fail,
    Fallback,
    Hedge,
    Reject,
    Request,
    Usage,
)
from serving.gateway.exchange import EngineFailed, Exchange, Rejected
from serving.gateway.metrics import Metrics
from serving.gateway.providers.calls import Providers
from serving.stream import record
from serving.stream.client import StreamClient
from serving.stream.frames import Ack, Cancel, Data, End, Head, Prompt, Resync, Submit

logger = logging.getLogger(__name__)

_RECONNECT_S = 0.5
# Replies that tell of the engine's trouble rather than of the request's: tried once
# more elsewhere. The second engine to say so is believed.
_ENGINE_TROUBLE = frozenset((500, 502, 503, 504))
# Where going on in the middle of a reply is understood: see
# `serving.engine.vllm.resume`. Replies of
# other endpoints bear ids that another engine would draw anew.
_RESUMABLE = frozenset(("/v1/chat/completions", "/v1/completions"))


class Driver:
    """Owns the clock, the timer, the links and the open exchanges.

    Everything runs on one event loop and nothing here awaits between asking
    the router and doing what it says.
    """

    def __init__(
        self,
        router: Router,
        gateway_id: str,
        window_bytes: int,
        max_record_bytes: int,
        metrics: Metrics,
    ) -> None:
        self.router = router
        self.metrics = metrics
        self.exchanges: dict[str, Exchange] = {}
        self.engines: dict[str, EngineInfo] = {}
        self.providers: Providers  # set by whoever makes both
        self._gateway_id = gateway_id
        self.records = Records(max_record_bytes)
        self._ack_bytes = window_bytes // 2
        self._links: dict[str, StreamClient] = {}
        self._streams: dict[str, dict[int, Exchange]] = {}
        self._members: dict[str, dict] = {}
        self._connecting: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._wake_s: float | None = None

    # --- clients ---------------------------------------------------------

    def open(self, exchange: Exchange) -> None:
        """A request has arrived: place it, hold it or refuse it."""
        self.exchanges[exchange.request.id] = exchange
        exchange.reply = Reply(self.records, can_resume=exchange.path in _RESUMABLE)
        self.execute(self.router.on_arrival(exchange.request, time.monotonic()))

    def cancel(self, exchange: Exchange) -> None:
        """The client has left. Does nothing if the response is complete.

        Many hang up at `[DONE]`, when the engine has yet to tell what the reply took.
        """
        if exchange.is_complete or self.exchanges.get(exchange.request.id) is not exchange:
            return
        if (link := self._release(exchange)) is not None:
            link.post(Cancel(exchange.reply.booking))
        self._stop_second(exchange)
        self.providers.cancel(exchange)
        self._close(exchange, EngineFailed("the client left"))
        self.execute(self.router.on_cancel(exchange.request.id, time.monotonic()))

    def taken(self, exchange: Exchange, num_bytes: int) -> None:
        """The client has taken so much of the response: let the engine send more."""
        exchange.num_taken_bytes += num_bytes
        replica_id = exchange.reply.replica_id
        if exchange.num_taken_bytes >= self._ack_bytes and replica_id is not None:
            if (link := self._links.get(replica_id)) is not None:
                link.post(Ack(exchange.reply.booking, exchange.num_taken_bytes))
            exchange.num_taken_bytes = 0
        elif replica_id is None:
            self.providers.taken(exchange, num_bytes)

    def set_policy(self, name: str, ablate: Collection[str] = ()) -> None:
        """Switch the policy at once; raises `ValueError` for an unknown name or part."""
        self.execute(self.router.set_policy(name, time.monotonic(), ablate))

    # --- engines ---------------------------------------------------------

    def set_members(self, members: Mapping[str, dict]) -> None:
        """Ray says which replicas there are, with the metadata of each.

        A replica that is not named any more drains: it gets no new work, its
        streams end in peace, then its link is closed.
        """
        for replica_id in members.keys() - self._members.keys():
            task = asyncio.get_running_loop().create_task(
                self._connect(replica_id, members[replica_id])
            )
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)
        gone = self._members.keys() - members.keys()
        self._members = dict(members)
        for replica_id in gone:
            self.execute(self.router.on_replica_draining(replica_id, time.monotonic()))
            self._close_if_drained(replica_id)

    async def _connect(self, replica_id: str, metadata: dict) -> None:
        """Connect, and again while Ray still names the replica."""
        while replica_id in self._members and replica_id not in self._links:
            try:
                self._links[replica_id] = await StreamClient.connect(
                    replica_id, metadata, self._gateway_id, self
                )
            except OSError as error:
                logger.warning("engine %s is not reachable: %s", replica_id, error)
                await asyncio.sleep(_RECONNECT_S)

    def on_welcome(self, link: StreamClient, info: EngineInfo) -> None:
        self.engines[link.replica_id] = info
        self._streams[link.replica_id] = {}
        self.execute(self.router.on_replica_up(link.replica_id, info, time.monotonic()))

    def on_snapshot(self, link: StreamClient, snapshot: EngineSnapshot) -> None:
        now_s = time.monotonic()
        self.execute(self.router.on_snapshot(link.replica_id, snapshot, now_s))

    def on_blocks(self, link: StreamClient, update: BlockUpdate) -> None:
        if not self.router.on_blocks(link.replica_id, update):
            link.post(Resync())

    def on_prompt(self, link: StreamClient, frame: Prompt) -> None:
        if (exchange := self._streams[link.replica_id].get(frame.stream)) is not None:
            self.router.on_prompt(exchange.request.id, frame.num_tokens, frame.block_hashes)

    def on_head(self, link: StreamClient, frame: Head) -> None:
        exchange = self._streams[link.replica_id].get(frame.stream)
        if exchange is None:
            return
        if frame.status in _ENGINE_TROUBLE and exchange.second == (link.replica_id, frame.stream):
            link.post(Cancel(frame.stream))
            self._lose_second(exchange, Failure.ERROR)
            return
        if frame.status in _ENGINE_TROUBLE and not exchange.num_error_replies:
            exchange.num_error_replies += 1
            link.post(Cancel(frame.stream))
            self._fail_attempt(exchange, Failure.ERROR, f"it answered {frame.status}")
            return
        exchange.on_head(frame.status, frame.headers)

    def on_data(self, link: StreamClient, frame: Data) -> None:
        exchange = self._streams[link.replica_id].get(frame.stream)
        if exchange is None:
            return  # cancelled; these bytes were under way
        if exchange.second is not None:
            self._choose(exchange, link, frame.stream)
        if not (frame.body or exchange.is_under_way):
            exchange.is_under_way = True
            self.router.on_progress(exchange.request.id)
        was_begun = exchange.reply.has_begun
        if exchange.reply.take(frame.body, frame.record):
            now_s = time.monotonic()
            if not was_begun:
                self.metrics.first_token(exchange.request, now_s)
            else:
                self.metrics.resumed(exchange.request, now_s - exchange.failed_s)
            self.execute(self.router.on_first_token(exchange.request.id, now_s))
        if frame.body:
            exchange.on_data(frame.body)

    def on_end(self, link: StreamClient, frame: End) -> None:
        exchange = self._streams[link.replica_id].get(frame.stream)
        if exchange is None:
            return
        if frame.error is not None and exchange.second == (link.replica_id, frame.stream):
            self._lose_second(exchange, Failure.ERROR)
            self._close_if_drained(link.replica_id)
            return
        exchange.usage = frame.usage
        if frame.error is None:
            now_s = time.monotonic()
            if exchange.second is not None:
                self._choose(exchange, link, frame.stream)
            self._release(exchange)
            self._close(exchange)
            self.metrics.finished(exchange.request, frame.usage, now_s)
            self.execute(self.router.on_finish(exchange.request.id, frame.usage, now_s))
        else:
            self._fail_attempt(exchange, Failure.ERROR, frame.error, can_retry=frame.can_retry)
        self._close_if_drained(link.replica_id)

    def on_lost(self, link: StreamClient) -> None:
        replica_id = link.replica_id
        if self._links.get(replica_id) is link:
            del self._links[replica_id]
        self.engines.pop(replica_id, None)
        lost = self._streams.pop(replica_id, {})
        # First close the door, then find the requests another place.
        self.execute(self.router.on_replica_down(replica_id, time.monotonic()))
        for booking, exchange in lost.items():
            if exchange.second == (replica_id, booking):
                self._lose_second(exchange, None)
                continue
            exchange.reply.lose()
            self._fail_attempt(exchange, None, "it was lost")
        if (metadata := self._members.pop(replica_id, None)) is not None:
            self.set_members({**self._members, replica_id: metadata})

    # --- providers -------------------------------------------------------

    def on_first_byte(self, exchange: Exchange) -> None:
        """A provider has begun to answer."""
        now_s = time.monotonic()
        if exchange.reply.has_begun:
            self.metrics.resumed(exchange.request, now_s - exchange.failed_s)
        else:
            self.metrics.first_token(exchange.request, now_s)
        self.execute(self.router.on_first_token(exchange.request.id, now_s))

    def on_complete(self, exchange: Exchange, usage: Usage | None) -> None:
        """A provider has answered."""
        now_s = time.monotonic()
        exchange.usage = usage
        self._close(exchange)
        self.metrics.finished(exchange.request, usage, now_s)
        self.execute(self.router.on_finish(exchange.request.id, usage, now_s))

    # --- decisions -------------------------------------------------------

    def execute(self, decisions: list[Decision]) -> None:
        """Carry out decisions of the router, in their order."""
        for decision in decisions:
            if isinstance(decision, Dispatch):
                self._dispatch(decision)
            elif isinstance(decision, Hedge):
                self._hedge(decision.dispatch)
            elif isinstance(decision, Fallback):
                self.providers.start(self.exchanges[decision.request_id], decision)
            elif isinstance(decision, Reject):
                exchange = self.exchanges[decision.request_id]
                self._close(exchange, Rejected(decision.reason, decision.retry_after_s))
            elif isinstance(decision, Fail):
                exchange = self.exchanges[decision.request_id]
                self._close(exchange, EngineFailed(exchange.failure))
            elif isinstance(decision, Evacuate):
                self._evacuate(decision)
        self._rearm()

    def _evacuate(self, decision: Evacuate) -> None:
        logger.warning("engine %s is left: %s", decision.replica_id, decision.reason)
        link = self._links[decision.replica_id]
        for booking, exchange in list(self._streams[decision.replica_id].items()):
            link.post(Cancel(booking))
            if exchange.second == (decision.replica_id, booking):
                self._lose_second(exchange, None)
            else:
                self._fail_attempt(exchange, None, f"it is {decision.reason}")

    def _fail_attempt(
        self, exchange: Exchange, failure: Failure | None, words: str, *, can_retry: bool = True
    ) -> None:
        """The engine did not carry the exchange through: another one may."""
        if exchange.second is not None and can_retry:
            self._release(exchange)
            self._take_second(exchange, failure)
            return
        self._stop_second(exchange)
        self._release(exchange)
        now_s = time.monotonic()
        exchange.failure, exchange.failed_s = words, now_s
        reply = exchange.reply
        self.execute(
            self.router.on_attempt_failed(
                exchange.request.id,
                failure,
                now_s,
                can_retry=can_retry and reply.can_go_on,
                has_begun=reply.has_begun,
                num_output_tokens=reply.moved_tokens(record.num_tokens(reply.record)),
            )
        )

    def _dispatch(self, decision: Dispatch) -> None:
        exchange = self.exchanges[decision.request_id]
        exchange.is_under_way = False
        self._submit(
            exchange, decision, exchange.reply.begin(decision.replica_id, decision.booking)
        )

    def _submit(self, exchange: Exchange, decision: Dispatch, resume: Resume | None) -> None:
        exchange.num_attempts += 1
        self._streams[decision.replica_id][decision.booking] = exchange
        self._links[decision.replica_id].post(
            Submit(
                decision.booking,
                exchange.request.id,
                exchange.request.num_prompt_tokens,
                decision.num_cached_tokens,
                self._engine_priority(exchange.request),
                exchange.method,
                exchange.path,
                exchange.headers,
                exchange.body,
                exchange.created_s,
                resume,
            )
        )

    # --- two engines for one request --------------------------------------

    def _hedge(self, decision: Dispatch) -> None:
        """The first token is late: ask another engine as well."""
        exchange = self.exchanges[decision.request_id]
        exchange.second = (decision.replica_id, decision.booking)
        self._submit(exchange, decision, None)

    def _choose(self, exchange: Exchange, link: StreamClient, stream: int) -> None:
        """One of both engines answers: the other may stop."""
        if exchange.second != (link.replica_id, stream):
            self._stop_second(exchange)  # the router hears of the first one's answer
            return
        booking = exchange.reply.booking
        if (first := self._release(exchange)) is not None:
            first.post(Cancel(booking))
        self._take_second(exchange, None)

    def _take_second(self, exchange: Exchange, failure: Failure | None) -> None:
        """The second engine has the request from here; the first one did this, if anything."""
        assert exchange.second is not None
        exchange.reply.begin(*exchange.second)
        exchange.second = None
        self.execute(self.router.on_hedge_won(exchange.request.id, failure, time.monotonic()))

    def _lose_second(self, exchange: Exchange, failure: Failure | None) -> None:
        """The second engine will not answer."""
        self._forget_second(exchange)
        self.execute(self.router.on_hedge_failed(exchange.request.id, failure, time.monotonic()))

    def _stop_second(self, exchange: Exchange) -> None:
        """The second engine's answer is not wanted any more, if there is one."""
        if (second := exchange.second) is not None:
            self._forget_second(exchange)
            self._links[second[0]].post(Cancel(second[1]))

    def _forget_second(self, exchange: Exchange) -> None:
        if (second := exchange.second) is not None:
            exchange.second = None
            self._streams.get(second[0], {}).pop(second[1], None)

    def _engine_priority(self, request: Request) -> int:
        """vLLM's priority: the promised first token, in ms since the epoch.

        By the wall clock, as requests of several gateways meet in one engine.
        """
        ttft_deadline_s = self.router.engine_priority_s(request)
        if ttft_deadline_s is None:
            return 0
        return round((time.time() + ttft_deadline_s - time.monotonic()) * 1000)

    def _rearm(self) -> None:
        self.providers.rearm()
        wake_s = self.router.next_wake_s()
        if wake_s == self._wake_s:
            return
        self._wake_s = wake_s
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if wake_s is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, wake_s - time.monotonic()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = self._wake_s = None
        self.execute(self.router.on_tick(time.monotonic()))

    # --- ends ------------------------------------------------------------

    def _release(self, exchange: Exchange) -> StreamClient | None:
        """Take the exchange off its engine; return the link to it, if there is one."""
        replica_id = exchange.reply.replica_id
        if replica_id is None:
            return None
        exchange.reply.lose()
        self._streams[replica_id].pop(exchange.reply.booking, None)
        return self._links.get(replica_id)

    def _close(self, exchange: Exchange, error: Exception | None = None) -> None:
        del self.exchanges[exchange.request.id]
        exchange.reply.end()
        exchange.on_end(error)

    def _close_if_drained(self, replica_id: str) -> None:
        link = self._links.get(replica_id)
        if link and replica_id not in self._members and not self._streams.get(replica_id):
            link.close()

    def close(self) -> None:
        """Leave: close every link. Engines abort what was open."""
        self._members = {}
        if self._timer is not None:
            self._timer.cancel()
        self.providers.close()
        for link in list(self._links.values()):
            link.close()
