"""The engine's end of the multiplexed stream: a TCP port that gateways connect to."""

import asyncio
import os
import secrets

import msgspec

from serving.engine.vllm.engine import Engine
from serving.stream.account import RequestAccounting
from serving.stream.call import Stream
from serving.stream.connection import FrameConnection
from serving.stream.frames import (
    Ack,
    Blocks,
    Cancel,
    Hello,
    Prompt,
    Resync,
    Snapshot,
    Submit,
    Welcome,
    decode_to_engine,
)

# A snapshot is at most this old under load; more often than the fastest
# engine steps (~5 ms) would only cost CPU.
SNAPSHOT_INTERVAL_S = 0.010
# vLLM records nothing while idle; this tells the gateway that we live.
HEARTBEAT_S = 0.5


class StreamServer:
    """Listens for gateways, runs their requests in the engine, pushes snapshots."""

    def __init__(self, engine: Engine, window_bytes: int) -> None:
        self.engine = engine
        self.window_bytes = window_bytes
        self.secret = secrets.token_hex(16)
        self.accounts: dict[Stream, RequestAccounting] = {}
        self._connections: set[Connection] = set()
        self._server: asyncio.Server | None = None
        self._seq = 0
        self._timer: asyncio.TimerHandle | None = None
        self._last_push_s = 0.0
        self._beat: asyncio.TimerHandle | None = None

    async def listen(self, host: str) -> tuple[str, int]:
        """Start listening on a free port of `host`; return the address."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self), host, 0)
        self.engine.subscribe(self.on_step)
        self._heartbeat()
        return self._server.sockets[0].getsockname()[:2]

    @property
    def num_streams(self) -> int:
        return len(self.accounts)

    def on_step(self) -> None:
        """An engine step is over, or a request came or went: push, soon or now."""
        loop = asyncio.get_running_loop()
        due_s = self._last_push_s + SNAPSHOT_INTERVAL_S - loop.time()
        if due_s <= 0 or not self.accounts:
            self._push()
        elif self._timer is None:
            self._timer = loop.call_later(due_s, self._push)

    def _push(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._last_push_s = asyncio.get_running_loop().time()
        for connection in self._connections:
            connection.push_snapshot()

    def next_snapshot_seq(self) -> int:
        self._seq += 1
        return self._seq

    def _heartbeat(self) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() - self._last_push_s >= HEARTBEAT_S * 0.9:
            self._push()
        self._beat = loop.call_later(HEARTBEAT_S, self._heartbeat)

    async def drain(self, timeout_s: float) -> None:
        """Return when no stream is left, or after `timeout_s`."""
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        while self.accounts and asyncio.get_running_loop().time() < deadline_s:
            await asyncio.sleep(0.05)

    def close(self) -> None:
        """Stop listening and drop every gateway; what still runs is aborted."""
        for timer in (self._beat, self._timer):
            if timer is not None:
                timer.cancel()
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.close()

    def connected(self, connection: "Connection") -> None:
        self._connections.add(connection)

    def disconnected(self, connection: "Connection") -> None:
        self._connections.discard(connection)

    def started(self, stream: Stream, account: RequestAccounting) -> None:
        self.accounts[stream] = account
        self.on_step()

    def ended(self, stream: Stream) -> None:
        self.engine.forget(self.accounts.pop(stream))
        self.on_step()


class Connection(FrameConnection):
    """One gateway."""

    def __init__(self, port: StreamServer) -> None:
        super().__init__()
        self._port = port
        self._streams: dict[int, Stream] = {}
        self._snapshot_due = False
        self._block_position = 0  # what this gateway knows of the prefix cache
        self._last_stream = 0
        self._greeted = False

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._port.disconnected(self)
        for stream in list(self._streams.values()):
            stream.cancel()

    def push_snapshot(self) -> None:
        self._snapshot_due = True
        self.schedule_flush()

    def outgoing(self, frames: list) -> list:
        if self._snapshot_due:
            self._snapshot_due = False
            port = self._port
            if (update := port.engine.blocks.since(self._block_position)) is not None:
                self._block_position = update.until
                frames.append(Blocks(update))
            snapshot = port.engine.snapshot(port.next_snapshot_seq(), list(port.accounts.values()))
            frames.append(
                Snapshot(msgspec.structs.replace(snapshot, last_booking=self._last_stream))
            )
        return frames

    def on_message(self, message: bytes) -> None:
        for frame in decode_to_engine(message):
            if not self._greeted:
                self._greet(frame)
            elif isinstance(frame, Submit):
                self._submit(frame)
            elif isinstance(frame, Cancel):
                if (stream := self._streams.get(frame.stream)) is not None:
                    stream.cancel()
            elif isinstance(frame, Ack) and (stream := self._streams.get(frame.stream)) is not None:
                stream.acknowledge(frame.num_bytes)
            elif isinstance(frame, Resync):
                self._block_position = -1

    def _greet(self, frame: object) -> None:
        if not isinstance(frame, Hello) or not secrets.compare_digest(
            frame.secret, self._port.secret
        ):
            raise ValueError("no valid Hello")
        self._greeted = True
        self._port.connected(self)
        info = msgspec.structs.replace(
            self._port.engine.info, heartbeat_s=HEARTBEAT_S, pid=os.getpid()
        )
        self.post(Welcome(info))
        self.push_snapshot()

    def _submit(self, frame: Submit) -> None:
        self._last_stream = frame.stream
        account = RequestAccounting(
            frame.num_prompt_tokens,
            frame.priority,
            num_expected_cached_tokens=frame.num_cached_tokens,
            request_id=frame.request_id,
            created_s=frame.created_s,
            resume=frame.resume,
        )
        account.on_prompt = lambda num_tokens, hashes: self.post(
            Prompt(frame.stream, num_tokens, hashes)
        )
        stream = Stream(
            frame,
            account,
            self._port.window_bytes,
            self.post,
            self._on_end,
            lambda: self._port.engine.dead,
            self.close,
        )
        self._streams[frame.stream] = stream
        self._port.started(stream, account)
        stream.start(self._port.engine.app)

    def _on_end(self, stream: Stream) -> None:
        del self._streams[stream.id]
        self._port.ended(stream)
