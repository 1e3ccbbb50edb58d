"""Which gateways does an engine serve, and when do they hear of its state?"""

import asyncio
import os
import secrets
import time

import msgspec

from router import EngineSnapshot
from router.types import (
    BOOKING_INTERVAL_S,
    HEARTBEAT_S,
    SNAPSHOT_INTERVAL_S,
    AdapterState,
)
from serving.engine.hardware_watch import HardwareState
from serving.stream.accounting import RequestAccounting
from serving.stream.call import AsgiCall
from serving.stream.engine import Engine
from serving.stream.frames import (
    Ack,
    Blocks,
    Busy,
    Cancel,
    Hardware,
    Hello,
    Resync,
    Snapshot,
    Submit,
    ToEngine,
    Welcome,
)
from serving.stream.life import LifePort
from serving.stream.strangers import StrangerConnection
from serving.stream.tls import HANDSHAKE_TIMEOUT_S, make_certificate

BEAT_S = HEARTBEAT_S / 2  # between two signs that the event loop turns
# A drain is over when nothing has come for so long, by so frequent looks.
_QUIET_S = 0.2
_LOOK_S = 0.05


class StreamServer:
    """Listen for gateways, run their requests in the engine, push snapshots."""

    def __init__(self, engine: Engine, window_bytes: int) -> None:
        self.engine = engine
        self.window_bytes = window_bytes
        self.secret = secrets.token_hex(16)
        self.certificate = ""  # PEM; empty: the connection is not encrypted
        self.life_port = LifePort(engine.lifeline) if engine.lifeline is not None else None
        self.strangers: set[StrangerConnection] = set()
        self.beat_s = time.monotonic()  # when the event loop last turned, about
        self.accountings: dict[AsgiCall, RequestAccounting] = {}  # of all calls that compute
        self.hardware: HardwareState | None = None  # None until it is known
        self._connections: set[GatewayConnection] = set()
        self._server: asyncio.Server | None = None
        self._seq = 0
        self._push_timer: asyncio.Handle | None = None
        self._push_due_s = 0.0  # when it fires; uvloop's handles do not tell
        self._last_push_s = 0.0
        self._heartbeat_timer: asyncio.TimerHandle | None = None
        self._beat_timer: asyncio.TimerHandle | None = None

    async def listen(self, host: str, *, tls: bool = False, clients: str = "") -> tuple[str, int]:
        """Start listening on a free TCP port of `host`; return host and port.

        With `tls` only `clients` are let in, if given: the authority of their certificates, PEM.
        """
        context = None
        if tls:
            self.certificate, context = make_certificate(clients)
        self._server = await asyncio.get_running_loop().create_server(
            lambda: GatewayConnection(self),
            host,
            0,
            ssl=context,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S if tls else None,
        )
        if self.life_port is not None:
            await self.life_port.listen(host)
        self.engine.subscribe(self.on_step)
        self._send_heartbeat()
        self._beat()
        return self._server.sockets[0].getsockname()[:2]

    @property
    def has_several_gateways(self) -> bool:
        return len(self._connections) > 1

    def is_busy_for(self, submit: Submit) -> bool:
        """Whether to give a request back: there is more to do before it than its gateway knew."""
        if not (submit.max_pending_tokens and self.has_several_gateways):
            return False
        snapshot = self.engine.snapshot(0, list(self.accountings.values()))
        return snapshot.num_pending_prefill_tokens > submit.max_pending_tokens

    @property
    def num_streams(self) -> int:
        return len(self.accountings)

    def on_step(self) -> None:
        """Push snapshots, now or soon: a step is over, or a request has come or gone."""
        self._push_within(SNAPSHOT_INTERVAL_S)

    def _push_within(self, interval_s: float) -> None:
        """Push snapshots once the last ones are so old, seconds; at once if no request is left."""
        loop = asyncio.get_running_loop()
        due_s = self._last_push_s + interval_s
        if due_s <= loop.time() or not self.accountings:
            self._push_snapshots()
        elif self._push_timer is None or due_s < self._push_due_s:
            if self._push_timer is not None:
                self._push_timer.cancel()
            self._push_due_s = due_s
            self._push_timer = loop.call_at(due_s, self._push_snapshots)

    def _push_snapshots(self) -> None:
        if self._push_timer is not None:
            self._push_timer.cancel()
            self._push_timer = None
        self._last_push_s = asyncio.get_running_loop().time()
        for connection in self._connections:
            connection.push_snapshot()

    def tell_hardware(self, state: HardwareState) -> None:
        """Tell all gateways how the hardware is, and those that come."""
        self.hardware = state
        for connection in self._connections:
            connection.post(Hardware(state))

    def next_snapshot_seq(self) -> int:
        """Return the next snapshot's number; numbers only grow."""
        self._seq += 1
        return self._seq

    def _send_heartbeat(self) -> None:
        """Push snapshots if none went out for an interval; do so again after the next."""
        loop = asyncio.get_running_loop()
        if loop.time() - self._last_push_s >= HEARTBEAT_S * 0.9:
            self._push_snapshots()
        self._heartbeat_timer = loop.call_later(HEARTBEAT_S, self._send_heartbeat)

    def _beat(self) -> None:
        """Leave a sign that the event loop turns; do so again soon."""
        self.beat_s = time.monotonic()
        if self.life_port is not None:
            self.life_port.lifeline.beat()
        self._beat_timer = asyncio.get_running_loop().call_later(BEAT_S, self._beat)

    async def drain(self, timeout_s: float) -> None:
        """Return when no request runs any more, or after `timeout_s`.

        One that a gateway holds for this engine comes when another has ended: so not at once.
        """
        loop = asyncio.get_running_loop()
        deadline_s, busy_s = loop.time() + timeout_s, loop.time()
        while loop.time() < min(deadline_s, busy_s + _QUIET_S):
            await asyncio.sleep(_LOOK_S)
            if self.num_streams:
                busy_s = loop.time()

    def close(self) -> None:
        """Stop listening and disconnect every gateway; requests that still run are aborted."""
        for timer in (self._heartbeat_timer, self._push_timer, self._beat_timer):
            if timer is not None:
                timer.cancel()
        if self._server is not None:
            self._server.close()
        if self.life_port is not None:
            self.life_port.close()
        for connection in [*self._connections, *self.strangers]:
            connection.close()

    def add_connection(self, connection: "GatewayConnection") -> None:
        self._connections.add(connection)

    def remove_connection(self, connection: "GatewayConnection") -> None:
        self._connections.discard(connection)

    def add_call(self, call: AsgiCall) -> None:
        self.accountings[call] = call.accounting
        self._push_within(BOOKING_INTERVAL_S if self.has_several_gateways else SNAPSHOT_INTERVAL_S)

    def remove_call(self, call: AsgiCall) -> None:
        self.engine.forget(self.accountings.pop(call))
        self.on_step()


class GatewayConnection(StrangerConnection):
    """One gateway's connection, and its requests by the number of their stream."""

    def __init__(self, server: StreamServer) -> None:
        super().__init__(server.strangers)
        self._server = server
        self._calls: dict[int, AsgiCall] = {}
        self._snapshot_is_due = False
        self._block_position = 0  # what this gateway knows of the prefix cache
        # And of LoRA adapters, as it was told last.
        self._adapters: AdapterState | None = None
        self._adapter_paths: dict[str, str] | None = None
        self._last_stream = 0
        self._given_back: list[Busy] = []  # to be sent after the next snapshot
        self._token = ""  # for its other connection

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._server.life_port is not None:
            self._server.life_port.tokens.discard(self._token)
        self._server.remove_connection(self)
        for call in list(self._calls.values()):
            call.cancel()

    def push_snapshot(self) -> None:
        """Send a snapshot with the next write."""
        self._snapshot_is_due = True
        self.schedule_flush()

    def frames_to_send(self, frames: list) -> list:
        if self._snapshot_is_due:
            self._snapshot_is_due = False
            server = self._server
            engine = server.engine
            if (update := engine.blocks.since(self._block_position)) is not None:
                self._block_position = update.until
                frames.append(Blocks(update))
            accountings = list(server.accountings.values())
            snapshot = engine.snapshot(server.next_snapshot_seq(), accountings)
            if snapshot.adapter_paths is not None:
                snapshot = self._without_known_adapters(snapshot)
            frames.append(
                Snapshot(msgspec.structs.replace(snapshot, last_booking=self._last_stream))
            )
            frames += self._given_back
            self._given_back.clear()
        return frames

    def _without_known_adapters(self, snapshot: EngineSnapshot) -> EngineSnapshot:
        """Return the snapshot without what has not changed of adapters since the last one."""
        adapters, paths = snapshot.adapters, snapshot.adapter_paths
        if adapters == self._adapters:
            adapters = None
        else:
            self._adapters = adapters
        if paths == self._adapter_paths:
            paths = None
        else:
            self._adapter_paths = paths
        return msgspec.structs.replace(snapshot, adapters=adapters, adapter_paths=paths)

    def on_hello(self, hello: Hello) -> None:
        """Admit the gateway and welcome it. Raise `ValueError` if it does not know the secret."""
        server = self._server
        if not secrets.compare_digest(hello.secret.encode(), server.secret.encode()):
            raise ValueError("a Hello with a wrong secret")
        server.add_connection(self)
        info = msgspec.structs.replace(server.engine.info, heartbeat_s=HEARTBEAT_S, pid=os.getpid())
        if server.life_port is None:
            self.post(Welcome(info))
        else:
            self._token = server.life_port.issue_token()
            self.post(Welcome(info, server.life_port.port, self._token))
        if server.hardware is not None:
            self.post(Hardware(server.hardware))
        self.push_snapshot()

    def on_frame(self, frame: ToEngine) -> None:
        if isinstance(frame, Submit):
            self._start_call(frame)
        elif isinstance(frame, Cancel):
            if (call := self._calls.get(frame.stream)) is not None:
                call.cancel()
        elif isinstance(frame, Ack) and (call := self._calls.get(frame.stream)) is not None:
            call.acknowledge(frame.num_bytes)
        elif isinstance(frame, Resync):
            self._block_position = -1

    def _start_call(self, submit: Submit) -> None:
        if self._server.is_busy_for(submit):
            self._last_stream = submit.stream  # the snapshot knows of it: it is not there
            self._given_back.append(Busy(submit.stream))
            self.push_snapshot()
            return
        engine = self._server.engine
        call = AsgiCall(
            submit,
            self._server.window_bytes,
            self.post,
            self._end_call,
            lambda: engine.dead,
            self.close,
        )
        self._calls[submit.stream] = call
        if submit.stream >= 0:  # others compute nothing, and are in no snapshot
            self._last_stream = submit.stream
            self._server.add_call(call)
        call.start(engine.app)

    def _end_call(self, call: AsgiCall) -> None:
        del self._calls[call.stream]
        if call.stream >= 0:
            self._server.remove_call(call)
