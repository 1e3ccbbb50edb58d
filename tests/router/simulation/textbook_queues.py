"""Engines from a textbook: what the simulator can be checked against by formula.

A job's output tokens are its service time, `SERVICE_S` each.
"""

from collections import deque

from router.fleet.block_log import BlockLog
from router.simulation.engine.sequence import Job, Progress
from router.types import EngineInfo, EngineSnapshot

SERVICE_S = 1e-6

_INFO = EngineInfo(
    model="queue",
    tasks=("generate",),
    max_model_len=1 << 40,
    max_num_seqs=1,
    max_num_batched_tokens=1 << 30,
    num_kv_tokens=1 << 60,
    block_size=16,
    engine="simulated queue",
)


class FirstComeFirstServed:
    """One job at a time, in the order of their coming."""

    info = _INFO
    step_num_decode_reqs = 0
    num_preemptions_total = 0
    slowness = 1.0

    def __init__(self) -> None:
        self.blocks = BlockLog()
        self.jobs: deque[Job] = deque()
        self._end_s = 0.0

    def add(self, job: Job) -> None:
        self.jobs.append(job)

    def begin_step(self, now_s: float, until_s: float) -> float | None:
        if not self.jobs:
            return None
        step_s = self.jobs[0].num_output_tokens * SERVICE_S
        self._end_s = now_s + step_s
        return step_s

    @property
    def step_ends_s(self) -> list[float]:
        return [self._end_s] if self.jobs else []

    def advance_to(self, now_s: float) -> None:
        pass

    def cut_run(self, now_s: float) -> float:
        return self._end_s

    def end_step(self, now_s: float) -> list[Progress]:
        return [_ended(self.jobs.popleft())]

    def abort(self, job_id: str) -> None:
        raise NotImplementedError  # no job leaves a textbook's queue early

    def num_output_tokens(self, job_id: str) -> int:
        return 0

    def snapshot(self, seq: int, last_booking: int) -> EngineSnapshot:
        return EngineSnapshot(
            seq=seq,
            last_booking=last_booking,
            num_running_reqs=min(1, len(self.jobs)),
            num_waiting_reqs=max(0, len(self.jobs) - 1),
            num_free_kv_tokens=_INFO.num_kv_tokens,
        )


class ProcessorSharing(FirstComeFirstServed):
    """All jobs at once, each at an equal share of the speed.

    A step lasts until the first of them ends, or another comes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._left_s: dict[str, float] = {}
        self._began_s = 0.0

    def add(self, job: Job) -> None:
        self.jobs.append(job)

    def begin_step(self, now_s: float, until_s: float) -> float | None:
        for job in self.jobs:
            self._left_s.setdefault(job.id, job.num_output_tokens * SERVICE_S)
        self._began_s = now_s
        if not self._left_s:
            return None
        self._end_s = now_s + min(self._left_s.values()) * len(self._left_s)
        return self._end_s - now_s

    def cut_run(self, now_s: float) -> float:
        self._end_s = now_s
        return now_s

    def end_step(self, now_s: float) -> list[Progress]:
        share_s = (now_s - self._began_s) / len(self._left_s)
        ended = []
        for job in list(self.jobs):
            if job.id not in self._left_s:
                continue
            self._left_s[job.id] -= share_s
            if self._left_s[job.id] < SERVICE_S / 2:
                del self._left_s[job.id]
                self.jobs.remove(job)
                ended.append(_ended(job))
        return ended


def _ended(job: Job) -> Progress:
    return Progress(job.id, 0, job.num_output_tokens, finished=True, num_cached_tokens=0)
