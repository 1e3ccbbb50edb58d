"""What do Ctrl-C and SIGTERM do to a launch?

| signal | effect                                                                    |
|--------|---------------------------------------------------------------------------|
| first  | raises `StopSignal` wherever the main thread is, so that waiting ends     |
| second | sets `must_hurry`: cleaning up goes on, but waits for nothing             |
| later  | none                                                                      |

One that follows within half a second is the same one: `timeout` and some job schedulers send it to
the process and to its group.
"""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Self, TypeVar

from serving.cluster.processes import STOP_SIGNALS

T = TypeVar("T")

_ECHO_S = 0.5


class StopSignal(KeyboardInterrupt):
    """The first signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Interrupts:
    """Count signals while in the block; raise only on the first, so cleaning up is never cut."""

    def __init__(self) -> None:
        self._count = 0
        self._last_s = -_ECHO_S
        self._before: dict[int, object] = {}

    @property
    def must_hurry(self) -> bool:
        """Whether a second signal has come, after which nothing is waited for."""
        return self._count > 1

    def __enter__(self) -> Self:
        self._before = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
        self.install_handlers()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def install_handlers(self) -> None:
        """Handle the signals; needed again after `ray.init`, which handles SIGTERM itself."""
        for signum in STOP_SIGNALS:
            if signum != signal.SIGHUP or self._before[signum] is not signal.SIG_IGN:  # `nohup`
                signal.signal(signum, self._on_signal)

    def stop_raising(self) -> None:
        """Raise on no signal from now on: cleaning up has begun for another reason."""
        self._count = max(self._count, 1)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        last_s, self._last_s = self._last_s, time.monotonic()
        if self._last_s - last_s < _ECHO_S:
            return
        self._count += 1
        if self._count == 1:
            raise StopSignal(signum)


def run_until_stopped(run: Callable[[], Awaitable[T]]) -> T:
    """Return what `run()` returns, on an event loop of its own.

    A signal cancels it, so that what it started is taken down on the way out. Raises
    `SystemExit` then: nothing is to be written.
    """
    import uvloop  # late: most commands need no event loop

    async def run_cancellable() -> T:
        task = asyncio.current_task()
        assert task is not None
        for signum in STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(signum, task.cancel)
        return await run()

    try:
        return uvloop.run(run_cancellable())
    except asyncio.CancelledError:
        print("Stopped before the end: nothing is written.")
        raise SystemExit(130) from None
