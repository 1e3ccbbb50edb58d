"""When is an engine's replica beyond help?

| what is seen                                                       | what is done           |
|--------------------------------------------------------------------|------------------------|
| the engine says that it is dead                                    | the replica exits      |
| its core does not answer, while the event loop between turns       | the replica exits      |
| the event loop does not turn, whatever the core does               | the replica exits      |
| the core's memory grows beyond bounds                              | the core is killed     |

Ray starts another replica then. Snapshots show none of this once the gateways have moved their
requests away: a hung engine without requests looks idle.
"""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from serving.cluster.loop_thread import LoopThread
from serving.config import EngineConfig
from serving.stream.server import BEAT_S, StreamServer

logger = logging.getLogger(__name__)

_CHECK_INTERVAL_S = 0.25
_PING_INTERVAL_S = 1.0
_LATE_S = 4.0 * BEAT_S  # an event loop whose last beat is older does not turn


class EngineWatch:
    """Looks at the engine of this process four times a second, from another event loop."""

    def __init__(
        self,
        config: EngineConfig,
        loop: LoopThread,
        server: StreamServer,
        max_growth_bytes: int | None,
        exit_process: Callable[[str], None],
    ) -> None:
        """`loop` is where `server` runs; `exit_process` is called with what is wrong."""
        self._config = config
        self._loop = loop
        self._server = server
        self._max_growth_bytes = max_growth_bytes
        self._exit = exit_process

    async def run(self) -> None:
        """Watch until something is wrong, or the task is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_death())
            group.create_task(self._watch_pings())
            lifeline = self._server.engine.lifeline
            if lifeline is not None and lifeline.pid and self._max_growth_bytes is not None:
                group.create_task(self._watch_memory(lifeline.pid, self._max_growth_bytes))

    async def _watch_death(self) -> None:
        """Exit at once when the engine dies: Serve would route to us for 24 s more (measured)."""
        while not self._server.engine.dead:
            await asyncio.sleep(_CHECK_INTERVAL_S)
        self._exit("the engine is dead")

    async def _watch_pings(self) -> None:
        """Exit when the core has not answered, or the event loop not turned, for too long.

        The core answers between two steps. What it answers the event loop has to read: while
        that is busy, nothing is known against the core.
        """
        while True:
            ping = asyncio.ensure_future(self._loop.run(self._server.engine.ping()))
            hung_s = blocked_s = 0.0
            before_s = time.monotonic()
            while not (await asyncio.wait({ping}, timeout=_CHECK_INTERVAL_S))[0]:
                now_s = time.monotonic()
                # We may have been stopped as well. Then all will be late for a moment.
                passed_s = min(now_s - before_s, 2.0 * _CHECK_INTERVAL_S)
                before_s = now_s
                if now_s - self._server.beat_s < _LATE_S:
                    hung_s, blocked_s = hung_s + passed_s, 0.0
                else:
                    blocked_s += passed_s
                if hung_s >= self._config.hang_timeout_s:
                    self._exit(
                        f"the engine has not answered for {hung_s:.0f} s (engine.hang_timeout_s)"
                    )
                if blocked_s >= self._config.block_timeout_s:
                    self._exit(
                        f"the event loop has been busy for {blocked_s:.0f} s "
                        "(engine.block_timeout_s)"
                    )
            if (error := ping.exception()) is not None:  # it died: `_watch_death` handles that
                logger.warning("the engine does not answer: %s", error)
            await asyncio.sleep(_PING_INTERVAL_S)

    async def _watch_memory(self, pid: int, max_growth_bytes: int) -> None:
        """Kill the core when it has taken too much memory since it was ready.

        Alone, before Ray or the kernel looks for somebody to kill and takes a gateway.
        """
        first = anonymous_bytes(pid)
        while True:
            await asyncio.sleep(_CHECK_INTERVAL_S)
            growth = anonymous_bytes(pid) - first
            if growth > max_growth_bytes:
                logger.error(
                    "the engine core (pid %d) has taken %d MiB more than when it was ready, and "
                    "%d MiB are allowed (engine.max_growth_bytes): killed",
                    pid,
                    growth >> 20,
                    max_growth_bytes >> 20,
                )
                os.kill(pid, signal.SIGKILL)
                return


def anonymous_bytes(pid: int) -> int:
    """Return the memory that a process has to itself, swapped or not; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.partition(":")[::2] for line in lines)
    return 1024 * sum(int(fields.get(name, "0 kB").split()[0]) for name in ("RssAnon", "VmSwap"))
