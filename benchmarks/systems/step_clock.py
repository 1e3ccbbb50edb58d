"""When does the null engine's next step end? Streams with the same step time advance together."""

import asyncio
import time
from collections.abc import Callable


class StepClock:
    """Ends a step every `step_s` for all its streams; stands still while it has none."""

    def __init__(self, step_s: float, on_step: Callable[[float, int], None]) -> None:
        """`on_step(duration_s, num_streams)` is called after each step."""
        self._step_s = step_s
        self._on_step = on_step
        self._waiting: list[asyncio.Future[None]] = []
        self._num_streams = 0
        self._task: asyncio.Task[None] | None = None

    def add_stream(self) -> None:
        self._num_streams += 1
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def remove_stream(self) -> None:
        self._num_streams -= 1

    def next_step(self) -> "asyncio.Future[None]":
        """Return a future that is done when the next step ends.

        Each stream has its own: a shared one would be cancelled for all when one task is.
        """
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        return future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due_s, last_s = loop.time(), time.monotonic()
        while self._num_streams:
            # After a late step the next one is not shorter, as in an engine.
            due_s = max(due_s + self._step_s, loop.time())
            await asyncio.sleep(due_s - loop.time())
            waiting, self._waiting = self._waiting, []
            for future in waiting:
                if not future.done():
                    future.set_result(None)
            now_s = time.monotonic()
            self._on_step(now_s - last_s, len(waiting))
            last_s = now_s
        self._task = None
