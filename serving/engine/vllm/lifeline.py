"""Does the engine core live, however busy the process of its replica is?

A replica's event loop tells the gateways of its engine: by snapshots, by answers to pings. While
it writes one huge reply it tells them nothing, and neither does a thread beside it, for such
writing keeps the interpreter to itself. So the core speaks of its own life, by a thread of its
own. Two ends of one Unix socket:

    the replica            the core
    `Lifeline.carry`   ->  a gateway's connection, which the core writes `Alive` frames to
    `Lifeline.beat`    ->  the replica's event loop turns
    (it ends)          ->  the core ends too, as nobody could use it any more

The core says nothing while the replica is stopped or stuck: it is as good as dead then. A replica
that is late with its beat is at work as long as it uses a processor.
"""

import ctypes
import logging
import os
import secrets
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from router.types import HEARTBEAT_S
from serving.stream.frames import Alive, encode

logger = logging.getLogger(__name__)

_ADDRESS = "HEADWAY_LIFELINE"  # an environment variable: name of the socket, pid of the replica
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CONNECTION, _BEAT = b"c", b"b"
# A replica's loop that is later than this is busy, or worse. It beats twice per heartbeat.
_LATE_S = 2.0 * HEARTBEAT_S


class Lifeline:
    """The replica's end."""

    def __init__(self) -> None:
        # Abstract, Linux's own kind: no file to clean up. Seqpacket: whole messages, and an end.
        self._name = f"headway-{os.getpid()}-{secrets.token_hex(16)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"\0{self._name}")
        self._listener.listen(1)
        self._line: socket.socket | None = None
        self.pid = 0  # of the core, once it is connected

    @contextmanager
    def offered(self) -> Iterator[None]:
        """Let the engine core that is started in the block find this end of the line."""
        os.environ[_ADDRESS] = f"{self._name} {os.getpid()}"
        try:
            yield
        finally:
            del os.environ[_ADDRESS]
        self._listener.setblocking(False)
        try:
            self._line, _ = self._listener.accept()
        except BlockingIOError:
            logger.warning("the engine core says nothing of its own: its replica speaks for it")
        else:
            self._line.setblocking(False)
            peer = self._line.getsockopt(
                socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
            )
            self.pid = struct.unpack("3i", peer)[0]
        finally:
            self._listener.close()

    def carry(self, connection: int) -> None:
        """Have the core write `Alive` frames to a socket; the caller may close it then."""
        if self._line is not None:
            with suppress(OSError):  # it is full or closed: that core has more serious trouble
                socket.send_fds(self._line, [_CONNECTION], [connection])

    def beat(self) -> None:
        """Tell the core that the replica's event loop turns."""
        if self._line is not None:
            with suppress(OSError):
                self._line.send(_BEAT)

    def close(self) -> None:
        """End the core, if it has not ended yet."""
        if self._line is not None:
            self._line.close()


class _Scheduler(Protocol):
    """What is told of vLLM's scheduler."""

    num_steps_total: int

    def get_num_unfinished_requests(self) -> int: ...


class AliveMixin:
    """Counts the steps of a scheduler, and has the core tell of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_steps_total = 0
        if address := os.environ.get(_ADDRESS):
            name, _, pid = address.partition(" ")
            die_with_parent(int(pid))
            line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            line.connect(f"\0{name}")
            _Reporter(line, self, int(pid)).start()  # type: ignore[arg-type]

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().update_from_output(*args, **kwargs)  # type: ignore[misc]
        self.num_steps_total += 1
        return outputs


def die_with_parent(pid: int) -> None:
    """Have Linux kill this process at the end of its parent; at once if it has ended already.

    Of a parent other than `pid` the end tells nothing: then only the line does.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != pid:
        if not Path(f"/proc/{pid}").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)


class _Reporter(threading.Thread):
    """The core's end: writes to each gateway twice a second that the core lives."""

    def __init__(self, line: socket.socket, scheduler: _Scheduler, replica_pid: int) -> None:
        super().__init__(name="lifeline", daemon=True)
        self._line = line
        self._scheduler = scheduler
        self._replica = Path(f"/proc/{replica_pid}/stat")
        self._replica_cpu = 0
        self._beat_s = time.monotonic()
        self._gateways: list[socket.socket] = []

    def run(self) -> None:
        due_s = time.monotonic()
        while True:
            now_s = time.monotonic()
            if now_s >= due_s:
                due_s = now_s + HEARTBEAT_S
                if self._replica_is_at_work(now_s):
                    self._tell_gateways()
            self._line.settimeout(due_s - now_s)
            with suppress(TimeoutError):
                self._read_message()

    def _read_message(self) -> None:
        try:
            message, fds, _, _ = socket.recv_fds(self._line, 1, 1)
        except ConnectionError:
            message, fds = b"", []
        if not message:
            os.kill(os.getpid(), signal.SIGKILL)
        self._beat_s = time.monotonic()
        for fd in fds:
            gateway = socket.socket(fileno=fd)
            gateway.setblocking(False)
            self._gateways.append(gateway)

    def _replica_is_at_work(self, now_s: float) -> bool:
        if now_s - self._beat_s < _LATE_S:
            return True
        try:
            state, *fields = self._replica.read_text().rpartition(")")[2].split()
        except OSError:
            return False
        before, self._replica_cpu = self._replica_cpu, int(fields[10]) + int(fields[11])
        return state not in "TtZX" and self._replica_cpu > before

    def _tell_gateways(self) -> None:
        scheduler = self._scheduler
        alive = Alive(scheduler.num_steps_total, scheduler.get_num_unfinished_requests())
        message = encode([alive])
        for gateway in list(self._gateways):
            try:
                is_whole = gateway.send(message) == len(message)
            except BlockingIOError:
                continue  # nobody reads: it can do without
            except OSError:
                is_whole = False
            if not is_whole:
                gateway.close()
                self._gateways.remove(gateway)
