"""When does an engine model step in real time?"""

import asyncio
import logging
from collections.abc import Callable

from router.simulation.engine.model import EngineModel
from router.simulation.engine.sequence import Job, Progress

logger = logging.getLogger(__name__)

# With a larger lag the machine is too slow for the engine that it emulates: times then measure
# the machine and not the engine.
_MAX_LAG_S = 0.25


class EngineClock:
    """Runs the model's steps on the event loop's timers.

    A step begins when the one before it was due to end, so that late timers (1 ms with uvloop)
    do not add up.
    """

    def __init__(self, model: EngineModel, on_step: Callable[[list[Progress]], None]) -> None:
        self.model = model
        self.max_lag_s = 0.0  # the most so far by which a step ended late
        self._on_step = on_step
        self._timer: asyncio.TimerHandle | None = None

    def add(self, job: Job) -> None:
        """Queue a job; an idle engine starts at once. Raises `ValueError` as the model does."""
        self.model.add(job)
        if self._timer is None:
            self._begin(asyncio.get_running_loop().time())

    def abort(self, job_id: str) -> None:
        """Drop a job at the end of the step in progress. Unknown ids do nothing."""
        self.model.abort(job_id)

    def stop(self) -> None:
        """Take no further step."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin(self, now_s: float) -> None:
        self.model.begin_step(now_s)
        end_s = self.model.end_s
        if end_s is not None:
            self._timer = asyncio.get_running_loop().call_at(end_s, self._end, end_s)

    def _end(self, end_s: float) -> None:
        self._timer = None
        lag_s = asyncio.get_running_loop().time() - end_s
        if lag_s > max(self.max_lag_s, _MAX_LAG_S):
            logger.warning("this machine is too slow for its emulated engine: %.1f s late", lag_s)
        self.max_lag_s = max(self.max_lag_s, lag_s)
        self._on_step(self.model.end_step(end_s))
        self._begin(end_s)
