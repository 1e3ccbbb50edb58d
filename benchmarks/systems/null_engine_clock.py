"""The step clock of the stand-in engine: all streams of one pace advance together."""

import asyncio
import time
from collections.abc import Callable


class Pace:
    """Steps all streams of one pace, and stands still while there is none."""

    def __init__(self, step_s: float, on_step: Callable[[float, int], None]) -> None:
        self._step_s = step_s
        self._on_step = on_step  # duration of the step in seconds, streams it advanced
        self._waiting: list[asyncio.Future[None]] = []
        self._num_streams = 0
        self._task: asyncio.Task[None] | None = None

    def enter(self) -> None:
        self._num_streams += 1
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def leave(self) -> None:
        self._num_streams -= 1

    def step(self) -> "asyncio.Future[None]":
        """Return what is done with the next step.

        A future of its own for each stream: a shared one would be cancelled
        for all when one task is.
        """
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        return future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due_s, last_s = loop.time(), time.monotonic()
        while self._num_streams:
            # A step that is late does not hurry the next, as in an engine.
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
