"""Real sockets in virtual time: the clock jumps to the next timer when nothing else happens.

All of it in one process and on one loop, so that what is under way on the
loopback interface arrives before the clock moves; what does not is merely late,
as on any network. The monotonic clock of the whole process is replaced, so that whoever reads it,
servers and clients included, lives in that time.
"""

import asyncio
import contextlib
import selectors
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

# For the kernel to deliver what was sent: milliseconds of a busy machine would be
# seconds of virtual time.
_SETTLE_S = 1e-4


class _Selector(selectors.DefaultSelector):  # type: ignore[misc,valid-type]
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0
        self._was_busy = False  # since the clock last moved

    def select(self, timeout: float | None = None) -> list:
        if timeout is None:
            return super().select(None)
        events = super().select(0)
        if not events and timeout > 0.0:
            if self._was_busy:
                time.sleep(_SETTLE_S)
                events = super().select(0)
            if not events:
                self.now_s += timeout
        self._was_busy = bool(events) or (self._was_busy and timeout <= 0.0)
        return events


@contextlib.contextmanager
def _clock(now_s: Callable[[], float]) -> Iterator[None]:
    monotonic = time.monotonic
    time.monotonic = now_s
    try:
        yield
    finally:
        time.monotonic = monotonic


def run(main: Coroutine[Any, Any, T]) -> T:
    """Return what `main` returns, run in virtual time."""
    selector = _Selector()
    with _clock(lambda: selector.now_s):
        factory = lambda: asyncio.SelectorEventLoop(selector)  # noqa: E731
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(main)
