r"""Which engines are there, and which attempt does a frame of theirs belong to?

named by Ray --connect--> up --not named any more--> draining --last attempt over--> closed
     ^                     |
     \--------lost---------/   its attempts are lost with the connection
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from router import BlockUpdate, Decision, Dispatch, EngineInfo, EngineSnapshot, Router
from router.resilience.resume import Resume
from serving.config.providers import ExternalConfig
from serving.engine.external.continuation import Continuation
from serving.engine.external.server import ExternalServer
from serving.engine.hardware_watch import HardwareState, unfit
from serving.gateway.exchange import Attempt, Exchange, Turn
from serving.gateway.http.endpoints.questions import Question, Questions
from serving.gateway.http.errors import UNLOADED
from serving.stream.client import Connection, StreamClient
from serving.stream.frames import (
    Ack,
    Alive,
    Busy,
    Cancel,
    Data,
    End,
    Head,
    Headers,
    Prompt,
    Resync,
    Submit,
)

logger = logging.getLogger(__name__)

_RECONNECT_S = 0.5


class AttemptEvents(Protocol):
    """Who has the exchanges, told on the event loop of what became of their attempts."""

    @property
    def turn(self) -> Turn: ...
    def execute(self, decisions: list[Decision]) -> None: ...
    def on_head(self, attempt: Attempt, frame: Head) -> None: ...
    def on_data(self, attempt: Attempt, frame: Data) -> None: ...
    def on_end(self, attempt: Attempt, frame: End) -> None: ...
    def on_attempt_lost(self, attempt: Attempt) -> None: ...
    def break_off(self, exchange: Exchange, error: Exception) -> None: ...
    def on_replica_lost(self, replica_id: str) -> None: ...
    def on_model_gone(self, names: Collection[str], why: str = ...) -> None: ...


class Engines:
    """The connections to all engines, each with the attempts that are open on it."""

    def __init__(self, router: Router, events: AttemptEvents) -> None:
        self.infos: dict[str, EngineInfo] = {}  # of those that are up, by replica
        self.hardware: dict[str, HardwareState] = {}  # of those that are up and have told
        self.questions = Questions()
        self.on_join: Callable[[str], None] = lambda _: None  # told of each engine that is up
        self._unfit: set[str] = set()  # of those, the ones that get no new work for it
        self._snapshots: dict[str, EngineSnapshot] = {}  # the last of each that is up
        self._router = router
        self._events = events
        self._members: dict[str, dict] = {}
        self._external: dict[str, dict] = {}  # likewise, servers that are not ours
        self._connecting: set[asyncio.Task[None]] = set()
        self._connections: dict[str, Connection] = {}
        self._attempts: dict[str, dict[int, Attempt]] = {}  # by replica and booking
        # Of the members, those that get no new work: they are to be stopped; take no connections.
        self._emptied: set[str] = set()
        self._leaving: set[str] = set()
        self.drained: set[str] = set()  # that an admin wants to get none, here or not
        self._removed: Collection[str] = ()  # names of models that are served no more

    # --- membership ------------------------------------------------------

    def set_members(self, members: Mapping[str, dict]) -> None:
        """Go by these replicas, which Ray names with the metadata of each.

        A replica that is not named any more drains: it gets no new work, its
        streams end in peace, then its connection is closed.
        """
        members = {**members, **self._external}
        for replica_id in members.keys() - self._members.keys():
            if replica_id in self.infos:  # Ray does not name it while its options change
                self._drain_or_not(replica_id)
            connecting = self._connect(replica_id, members[replica_id])
            task = asyncio.create_task(connecting, name=replica_id)
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)
        gone = self._members.keys() - members.keys()
        self._members = dict(members)
        for task in self._connecting:
            if task.get_name() in gone:
                task.cancel()
        for replica_id in gone:
            if not self._only_finishes(replica_id):
                self._events.execute(self._router.on_replica_draining(replica_id, time.monotonic()))
                self._close_if_drained(replica_id)

    def remove_models(self, names: Collection[str]) -> None:
        """Go by these models as removed: until their engines end they get what is held for them."""
        self._removed = names
        for replica_id in self.infos.keys() - self._members.keys():
            if self._only_finishes(replica_id):
                self._drain_or_not(replica_id)

    def _only_finishes(self, replica_id: str) -> bool:
        """Whether an engine is there only for what came before its model was removed."""
        info = self.infos.get(replica_id)
        return info is not None and info.model in self._removed

    def use_external(self, servers: Sequence[ExternalConfig], window_bytes: int) -> None:
        """Have these servers among the engines, beside those that Ray names; drain others.

        `window_bytes` of one reply may be on their way. Raise `ConfigError`, and change nothing,
        for a key or a certificate that cannot be read.
        """
        for server in servers:
            ExternalServer.check(server)
        ours = {name: each for name, each in self._members.items() if name not in self._external}
        self._external = {
            server.name: {"external": server, "window_bytes": window_bytes} for server in servers
        }
        self.set_members(ours)

    def empty(self, replica_ids: Collection[str]) -> None:
        """Send these replicas no new work, for they are to be stopped, and all others some."""
        for replica_id in self._members.keys() & self.infos.keys():
            drains = replica_id in replica_ids
            if drains != (replica_id in self._emptied):
                (self._emptied.add if drains else self._emptied.discard)(replica_id)
                self._drain_or_not(replica_id)

    @property
    def out_of_use(self) -> list[str]:
        """Engines that get no new work: an admin drained them, or their hardware has a fault."""
        return list((self._unfit | self.drained) & self.infos.keys())

    @property
    def known(self) -> set[str]:
        """The ids of all engines that are here, or should be."""
        return self._members.keys() | self.infos.keys()

    def drain(self, replica_id: str, *, drains: bool) -> None:
        """Send a replica no new work, or some again; what it has goes on. It may come later."""
        (self.drained.add if drains else self.drained.discard)(replica_id)
        if replica_id in self._members:  # else it drains anyhow, or is not there yet
            self._drain_or_not(replica_id)

    def _drain_or_not(self, replica_id: str) -> None:
        """Send a replica no new work if anybody has a reason for that, else some.

        It is to be stopped, takes no connections, its hardware is bad, or an admin wants it.
        """
        drains = replica_id in self._emptied | self._leaving | self._unfit | self.drained
        now_s = time.monotonic()
        self._events.execute(
            self._router.on_replica_draining(replica_id, now_s, is_draining=drains)
        )

    async def _connect(self, replica_id: str, metadata: dict) -> None:
        """Connect, and again while Ray still names the replica."""
        while replica_id in self._members and replica_id not in self._connections:
            try:
                if (external := metadata.get("external")) is not None:
                    window_bytes = metadata["window_bytes"]
                    server = await ExternalServer.connect(replica_id, external, self, window_bytes)
                    self._connections[replica_id] = server
                    server.start()
                    return
                self._connections[replica_id] = await StreamClient.connect(
                    replica_id, metadata, self
                )
            except OSError as error:
                logger.warning("engine %s is not reachable: %s", replica_id, error)
                await asyncio.sleep(_RECONNECT_S)

    def _close_if_drained(self, replica_id: str) -> None:
        connection = self._connections.get(replica_id)
        if replica_id in self._members or self._only_finishes(replica_id):
            return
        if connection and not self._attempts.get(replica_id):
            connection.close()

    def close(self) -> None:
        """Close every connection. Engines abort what was open."""
        self._members = self._external = {}
        for task in self._connecting:
            task.cancel()
        for connection in list(self._connections.values()):
            connection.close()

    # --- attempts --------------------------------------------------------

    def submit(
        self, exchange: Exchange, decision: Dispatch, priority: int, resume: Resume | None
    ) -> None:
        """Send an exchange to an engine, to go on with what there is of its reply."""
        attempt = Attempt(exchange, self._connections[decision.replica_id], decision.booking)
        exchange.attempts.append(attempt)
        exchange.was_sent = True
        self._attempts[decision.replica_id][decision.booking] = attempt
        submit = Submit(
            decision.booking,
            exchange.request.id,
            exchange.request.num_prompt_tokens,
            decision.num_cached_tokens,
            priority,
            exchange.method,
            exchange.path,
            exchange.headers,
            exchange.engine_body(),
            exchange.created_s,
            resume,
            decision.max_pending_tokens,
        )
        if isinstance(attempt.connection, ExternalServer):
            is_new = resume is None and len(exchange.attempts) == 1  # a hedge shares it
            if exchange.external_reply is None or is_new:
                exchange.external_reply = Continuation()
            if not attempt.connection.submit(submit, exchange.external_reply):
                exchange.reply.only_count()
        else:
            attempt.connection.post(submit)

    def get(self, replica_id: str, booking: int) -> Attempt:
        """Return the attempt of this booking, which is open."""
        return self._attempts[replica_id][booking]

    def at_replica(self, replica_id: str) -> list[Attempt]:
        """Return the attempts that are open on one engine."""
        return list(self._attempts[replica_id].values())

    def acknowledge_bytes(self, attempt: Attempt, num_bytes: int) -> None:
        """Let the engine send so many bytes more."""
        attempt.connection.post(Ack(attempt.booking, num_bytes))

    def cancel(self, attempt: Attempt) -> None:
        """Tell the engine to stop."""
        attempt.connection.post(Cancel(attempt.booking))
        self.end(attempt)

    def end(self, attempt: Attempt) -> None:
        """Hear of an attempt no more. One whose engine was lost has ended already."""
        attempt.exchange.attempts.remove(attempt)
        if (attempts := self._attempts.get(attempt.replica_id)) is not None:
            attempts.pop(attempt.booking, None)
            self._close_if_drained(attempt.replica_id)

    # --- questions -------------------------------------------------------

    def having(self, route: str) -> list[str]:
        """Return the engines that have this route, the one with the least work first."""
        found = [replica_id for replica_id, info in self.infos.items() if route in info.routes]
        return sorted(found, key=self._work)

    def have(self, route: str) -> bool:
        """Whether any engine has this route."""
        return any(route in info.routes for info in self.infos.values())

    def _work(self, replica_id: str) -> tuple[int, int]:
        if (snapshot := self._snapshots.get(replica_id)) is None:
            return 0, 0
        return snapshot.num_pending_prefill_tokens, snapshot.num_inflight_reqs

    def ask(
        self, replica_id: str, method: str, path: str, headers: Headers, body: bytes
    ) -> Question:
        """Ask an engine that is up what the router does not have to know of."""
        return self.questions.ask(self._connections[replica_id], method, path, headers, body)

    # --- what engines tell -----------------------------------------------

    def on_received(self, client: Connection) -> None:
        self._events.turn.hold()

    def on_all_told(self, client: Connection) -> None:
        self._events.turn.release()

    def on_welcome(self, client: Connection, info: EngineInfo) -> None:
        self.infos[client.replica_id] = info
        for each in (self._emptied, self._leaving):  # a new connection begins anew
            each.discard(client.replica_id)
        self._attempts[client.replica_id] = {}
        now_s, drains = time.monotonic(), client.replica_id in self.drained
        up = self._router.on_replica_up(client.replica_id, info, now_s, is_draining=drains)
        self._events.execute(up)
        self.on_join(client.replica_id)

    def on_leaving(self, client: Connection, *, is_leaving: bool) -> None:
        """Send a server that takes no connections no new work, until it does."""
        (self._leaving.add if is_leaving else self._leaving.discard)(client.replica_id)
        self._drain_or_not(client.replica_id)

    def on_snapshot(self, client: Connection, snapshot: EngineSnapshot) -> None:
        self._snapshots[client.replica_id] = snapshot
        now_s = time.monotonic()
        gone: set[str] = set()  # LoRA adapters that were unloaded from the last engine
        if (paths := snapshot.adapter_paths) is not None:
            info = self.infos[client.replica_id]
            self.infos[client.replica_id] = info.with_adapters(paths)
            gone = info.adapters.keys() - set().union(*(i.adapters for i in self.infos.values()))
        self._events.execute(self._router.on_snapshot(client.replica_id, snapshot, now_s))
        if gone:
            self._events.on_model_gone(gone, UNLOADED)

    def on_alive(self, client: Connection, frame: Alive) -> None:
        num_steps, now_s = frame.num_steps_total, time.monotonic()
        self._router.on_alive(client.replica_id, num_steps, frame.num_requests, now_s)

    def on_hardware(self, client: Connection, state: HardwareState) -> None:
        """Send no new work to hardware with a fault, nor to slow one if its model has better."""
        self.hardware[client.replica_id] = state
        now_unfit = unfit(self.hardware, {each: info.model for each, info in self.infos.items()})
        for replica_id in now_unfit ^ self._unfit:
            if replica_id in now_unfit:
                hardware = self.hardware[replica_id]
                reason = hardware.fault or hardware.slow
                logger.warning("engine %s gets no new requests: %s", replica_id, reason)
            (self._unfit.add if replica_id in now_unfit else self._unfit.discard)(replica_id)
            self._drain_or_not(replica_id)

    def on_blocks(self, client: Connection, update: BlockUpdate) -> None:
        if not self._router.on_blocks(client.replica_id, update):
            client.post(Resync())

    # Frames of attempts that were cancelled may still be under way: they have none here. What
    # fails in our own code under one of them ends that exchange, not the connection of all.

    def on_prompt(self, client: Connection, frame: Prompt) -> None:
        replica_id = client.replica_id
        if (attempt := self._attempts[replica_id].get(frame.stream)) is not None:
            exchange = attempt.exchange
            if exchange.request.num_prompts == 1:
                exchange.num_prompt_tokens = frame.num_tokens
            request_id = exchange.request.id
            self._router.on_prompt(request_id, replica_id, frame.num_tokens, frame.block_hashes)

    def on_busy(self, client: Connection, frame: Busy) -> None:
        if (attempt := self._attempts[client.replica_id].get(frame.stream)) is not None:
            self.end(attempt)
            exchange, now_s = attempt.exchange, time.monotonic()
            exchange.journey.forget_place(client.replica_id)
            decide = self._router.failures.on_refused_as_busy
            self._events.execute(decide(exchange.request.id, client.replica_id, now_s))

    def on_head(self, client: Connection, frame: Head) -> None:
        if frame.stream < 0:
            self.questions.on_frame(client, frame)
        elif (attempt := self._attempts[client.replica_id].get(frame.stream)) is not None:
            try:
                self._events.on_head(attempt, frame)
            except Exception as error:
                self._events.break_off(attempt.exchange, error)

    def on_data(self, client: Connection, frame: Data) -> None:
        if frame.stream < 0:
            self.questions.on_frame(client, frame)
        elif (attempt := self._attempts[client.replica_id].get(frame.stream)) is not None:
            try:
                self._events.on_data(attempt, frame)
            except Exception as error:
                self._events.break_off(attempt.exchange, error)

    def on_end(self, client: Connection, frame: End) -> None:
        if frame.stream < 0:
            self.questions.on_frame(client, frame)
        elif (attempt := self._attempts[client.replica_id].get(frame.stream)) is not None:
            try:
                self._events.on_end(attempt, frame)
            except Exception as error:
                self._events.break_off(attempt.exchange, error)

    def on_lost(self, client: Connection) -> None:
        replica_id = client.replica_id
        finished = self.infos.get(replica_id) if self._only_finishes(replica_id) else None
        if self._connections.get(replica_id) is client:
            del self._connections[replica_id]
        self.infos.pop(replica_id, None)
        self.hardware.pop(replica_id, None)
        self._unfit.discard(replica_id)
        self._snapshots.pop(replica_id, None)
        lost = self._attempts.pop(replica_id, {})
        # First close the door, then find the requests another place.
        self._events.execute(self._router.on_replica_down(replica_id, time.monotonic()))
        for attempt in lost.values():
            self._events.on_attempt_lost(attempt)
        self.questions.on_lost(client)
        self._events.on_replica_lost(replica_id)
        if finished and not any(each.model == finished.model for each in self.infos.values()):
            self._events.on_model_gone((finished.model, *finished.aliases))
        if (metadata := self._members.pop(replica_id, None)) is not None:
            self.set_members({**self._members, replica_id: metadata})
