"""Carries out the router's decisions: the shell around the core, in a gateway."""

import asyncio
import logging
import time
from collections.abc import Collection, Mapping

from router.core import Router
from router.types import Decision, Dispatch, EngineInfo, EngineSnapshot, Reject, Request
from serving.exchange import EngineFailed, Exchange, Rejected
from serving.link import Link
from serving.metrics import Metrics
from serving.wire import Ack, Cancel, Data, End, Head, Submit

logger = logging.getLogger(__name__)

# An engine that dies takes a request with it at most this often; after that
# the request itself is the likely cause.
_MAX_ATTEMPTS = 3
_RECONNECT_S = 0.5


class Driver:
    """Owns the clock, the timer, the links and the open exchanges.

    Everything runs on one event loop and nothing here awaits between asking
    the router and doing what it says.
    """

    def __init__(
        self, router: Router, gateway_id: str, window_bytes: int, metrics: Metrics
    ) -> None:
        self.router = router
        self.metrics = metrics
        self.exchanges: dict[str, Exchange] = {}
        self.engines: dict[str, EngineInfo] = {}
        self._gateway_id = gateway_id
        self._ack_bytes = window_bytes // 2
        self._links: dict[str, Link] = {}
        self._streams: dict[str, dict[int, Exchange]] = {}
        self._members: dict[str, dict] = {}
        self._connecting: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._wake_s: float | None = None

    # --- clients ---------------------------------------------------------

    def open(self, exchange: Exchange) -> None:
        """A request has arrived: place it, hold it or refuse it."""
        self.exchanges[exchange.request.id] = exchange
        self._execute(self.router.on_arrival(exchange.request, time.monotonic()))

    def cancel(self, exchange: Exchange) -> None:
        """The client has left. Does nothing if the response is complete."""
        if self.exchanges.get(exchange.request.id) is not exchange:
            return
        if (link := self._release(exchange)) is not None:
            link.post(Cancel(exchange.booking))
        self._close(exchange, EngineFailed("the client left"))
        self._execute(self.router.on_cancel(exchange.request.id, time.monotonic()))

    def taken(self, exchange: Exchange, num_bytes: int) -> None:
        """The client has taken so much of the response: let the engine send more."""
        exchange.num_taken_bytes += num_bytes
        if exchange.num_taken_bytes >= self._ack_bytes and exchange.replica_id is not None:
            if (link := self._links.get(exchange.replica_id)) is not None:
                link.post(Ack(exchange.booking, exchange.num_taken_bytes))
            exchange.num_taken_bytes = 0

    def set_policy(self, name: str, ablate: Collection[str] = ()) -> None:
        """Switch the policy at once; raises `ValueError` for an unknown name or part."""
        self._execute(self.router.set_policy(name, time.monotonic(), ablate))

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
            self._execute(self.router.on_replica_draining(replica_id, time.monotonic()))
            self._close_if_drained(replica_id)

    async def _connect(self, replica_id: str, metadata: dict) -> None:
        """Connect, and again while Ray still names the replica."""
        while replica_id in self._members and replica_id not in self._links:
            try:
                self._links[replica_id] = await Link.connect(
                    replica_id, metadata, self._gateway_id, self
                )
            except OSError as error:
                logger.warning("engine %s is not reachable: %s", replica_id, error)
                await asyncio.sleep(_RECONNECT_S)

    def on_welcome(self, link: Link, info: EngineInfo) -> None:
        self.engines[link.replica_id] = info
        self._streams[link.replica_id] = {}
        self._execute(self.router.on_replica_up(link.replica_id, info, time.monotonic()))

    def on_snapshot(self, link: Link, snapshot: EngineSnapshot) -> None:
        now_s = time.monotonic()
        self._execute(self.router.on_snapshot(link.replica_id, snapshot, now_s))

    def on_head(self, link: Link, frame: Head) -> None:
        if (exchange := self._streams[link.replica_id].get(frame.stream)) is not None:
            exchange.on_head(frame.status, frame.headers)

    def on_data(self, link: Link, frame: Data) -> None:
        exchange = self._streams[link.replica_id].get(frame.stream)
        if exchange is None:
            return  # cancelled; these bytes were under way
        if not exchange.started:
            now_s = time.monotonic()
            self.metrics.first_token(exchange.request, now_s)
            self._execute(self.router.on_first_token(exchange.request.id, now_s))
        exchange.on_data(frame.body)

    def on_end(self, link: Link, frame: End) -> None:
        exchange = self._streams[link.replica_id].get(frame.stream)
        if exchange is None:
            return
        now_s = time.monotonic()
        request_id = exchange.request.id
        exchange.usage = frame.usage
        self._release(exchange)
        if frame.error is None:
            self._close(exchange)
            self.metrics.finished(exchange.request, frame.usage, now_s)
            self._execute(self.router.on_finish(request_id, frame.usage, now_s))
        else:
            self._close(exchange, EngineFailed(frame.error))
            self._execute(self.router.on_fail(request_id, now_s))
        self._close_if_drained(link.replica_id)

    def on_lost(self, link: Link) -> None:
        replica_id = link.replica_id
        if self._links.get(replica_id) is link:
            del self._links[replica_id]
        self.engines.pop(replica_id, None)
        lost = self._streams.pop(replica_id, {})
        now_s = time.monotonic()
        # First close the door, then find the requests another place.
        self._execute(self.router.on_replica_down(replica_id, now_s))
        for exchange in lost.values():
            exchange.replica_id = None
            if exchange.started or exchange.num_attempts >= _MAX_ATTEMPTS:
                self._close(exchange, EngineFailed("the engine was lost"))
                self._execute(self.router.on_fail(exchange.request.id, now_s))
            else:
                self._execute(self.router.on_send_failed(exchange.request.id, now_s))
        if (metadata := self._members.pop(replica_id, None)) is not None:
            self.set_members({**self._members, replica_id: metadata})

    # --- decisions -------------------------------------------------------

    def _execute(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            if isinstance(decision, Dispatch):
                self._dispatch(decision)
            elif isinstance(decision, Reject):
                exchange = self.exchanges[decision.request_id]
                self._close(exchange, Rejected(decision.reason, decision.retry_after_s))
        self._rearm()

    def _dispatch(self, decision: Dispatch) -> None:
        exchange = self.exchanges[decision.request_id]
        exchange.replica_id, exchange.booking = decision.replica_id, decision.booking
        exchange.num_attempts += 1
        self._streams[decision.replica_id][decision.booking] = exchange
        self._links[decision.replica_id].post(
            Submit(
                decision.booking,
                exchange.request.id,
                exchange.request.num_prompt_tokens,
                self._engine_priority(exchange.request),
                exchange.method,
                exchange.path,
                exchange.headers,
                exchange.body,
            )
        )

    def _engine_priority(self, request: Request) -> int:
        """vLLM's priority: the promised first token, in ms since the epoch.

        By the wall clock, as requests of several gateways meet in one engine.
        """
        promised_s = self.router.engine_priority_s(request)
        if promised_s is None:
            return 0
        return round((time.time() + promised_s - time.monotonic()) * 1000)

    def _rearm(self) -> None:
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
        self._execute(self.router.on_tick(time.monotonic()))

    # --- ends ------------------------------------------------------------

    def _release(self, exchange: Exchange) -> Link | None:
        """Take the exchange off its engine; return the link to it, if there is one."""
        replica_id, exchange.replica_id = exchange.replica_id, None
        if replica_id is None:
            return None
        self._streams[replica_id].pop(exchange.booking, None)
        return self._links.get(replica_id)

    def _close(self, exchange: Exchange, error: Exception | None = None) -> None:
        del self.exchanges[exchange.request.id]
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
        for link in list(self._links.values()):
            link.close()
