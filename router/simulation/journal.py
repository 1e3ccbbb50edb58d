"""What became of every request of a simulated run? Columns, one entry per request."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from router import Outcome, RequestClass
from router.simulation.workload.workload import Workload

NOT_ENDED = -1
OUTCOME_NUMBER = {outcome: number for number, outcome in enumerate(Outcome)}


# By member, which is found faster than its value.
_CLASS_NAMES = {each: each.value for each in RequestClass}


class Journal:
    """Records a run in progress: seconds of virtual time, `nan` for what never happened."""

    def __init__(self, workload: Workload) -> None:
        num_requests = len(workload)
        nan = float("nan")
        self.workload = workload
        self.placed_s = [nan] * num_requests  # when it was last sent to an engine
        self.first_s = [nan] * num_requests  # first token at the gateway
        self.end_s = [nan] * num_requests
        self.outcome = [NOT_ENDED] * num_requests
        self.num_cached_tokens = [0] * num_requests
        self.num_preemptions_each = [0] * num_requests
        self.step_gaps_s: list[float] = []  # between a sequence's tokens
        self.step_gap_counts: list[int] = []  # sequences that had that gap
        self.num_gaps_by_tenth: list[int] = []  # before each tenth of the requests came
        self._next_mark = 0
        self.num_preemptions = 0  # also of jobs that were lost or cancelled
        self.num_events = 0

    def record_arrival(self, number: int) -> None:
        """Record that a request came, so that gaps can be told apart by time."""
        if number >= self._next_mark:
            self.num_gaps_by_tenth.append(len(self.step_gaps_s))
            self._next_mark = len(self.num_gaps_by_tenth) * len(self.end_s) // 10

    def record_steps(self, began_s: float, ends_s: Sequence[float], num_decode_reqs: int) -> None:
        """Record successive steps, in each of which so many requests got a token."""
        for end_s in ends_s:
            self.step_gaps_s.append(end_s - began_s)
            self.step_gap_counts.append(num_decode_reqs)
            began_s = end_s

    def record_outcome(self, number: int, outcome: Outcome, now_s: float) -> None:
        """Record how a request ended. Raises `RuntimeError` if it has ended before."""
        if self.outcome[number] != NOT_ENDED:
            raise RuntimeError(f"request {number} ended twice")
        self.outcome[number] = OUTCOME_NUMBER[outcome]
        self.end_s[number] = now_s

    def to_run(self) -> "Run":
        """Return the records as arrays."""
        arrivals = self.workload.arrivals
        gaps_s = np.array(self.step_gaps_s)
        return Run(
            arrival_s=np.array([each.offset_s for each in arrivals]),
            num_prompt_tokens=np.array([each.num_prompt_tokens for each in arrivals]),
            num_output_tokens=np.array([each.num_output_tokens for each in arrivals]),
            tenant=_column([each.tenant for each in arrivals]),
            priority_class=_column([_CLASS_NAMES[each.priority_class] for each in arrivals]),
            placed_s=np.array(self.placed_s),
            first_s=np.array(self.first_s),
            end_s=np.array(self.end_s),
            outcome=np.array(self.outcome, dtype=np.int8),
            num_cached_tokens=np.array(self.num_cached_tokens),
            num_preemptions_each=np.array(self.num_preemptions_each),
            gaps_s=gaps_s,
            gap_counts=np.array(self.step_gap_counts, dtype=int),
            num_gaps_by_tenth=tuple(self.num_gaps_by_tenth),
            num_preemptions=self.num_preemptions,
            num_events=self.num_events,
        )


def _column(names: list[str]) -> NDArray[np.str_]:
    """Return names as an array; mostly they are all the same."""
    if len(set(names)) == 1:
        return np.full(len(names), names[0])
    return np.array(names)


@dataclass(frozen=True)
class Run:
    """A run that has ended. Arrays are [num_requests] in order of arrival, gaps [num_gaps]."""

    arrival_s: NDArray[np.float64]
    num_prompt_tokens: NDArray[np.int_]
    num_output_tokens: NDArray[np.int_]
    tenant: NDArray[np.str_]
    priority_class: NDArray[np.str_]
    placed_s: NDArray[np.float64]
    first_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    outcome: NDArray[np.int8]
    num_cached_tokens: NDArray[np.int_]
    num_preemptions_each: NDArray[np.int_]
    gaps_s: NDArray[np.float64] = field(repr=False)
    gap_counts: NDArray[np.int_] = field(repr=False)
    num_gaps_by_tenth: tuple[int, ...] = ()
    num_preemptions: int = 0
    num_events: int = 0

    def __len__(self) -> int:
        return len(self.arrival_s)

    def has(self, outcome: Outcome) -> NDArray[np.bool_]:
        """Return which requests ended so, [num_requests]."""
        ended_so: NDArray[np.bool_] = self.outcome == OUTCOME_NUMBER[outcome]
        return ended_so

    def gaps_within(self, window: tuple[float, float]) -> slice:
        """Return which gaps ended while this part of the requests came, by shares, to a tenth."""
        if not self.num_gaps_by_tenth:
            return slice(None)
        marks = (*self.num_gaps_by_tenth, len(self.gaps_s))
        first, last = (min(len(marks) - 1, round(10 * share)) for share in window)
        return slice(marks[first], marks[last])

    @cached_property
    def completed(self) -> NDArray[np.bool_]:
        return self.has(Outcome.COMPLETED)

    @cached_property
    def ttft_s(self) -> NDArray[np.float64]:
        """Seconds to the first token; `nan` where the request did not complete."""
        return np.where(self.completed, self.first_s - self.arrival_s, np.nan)

    @cached_property
    def e2e_s(self) -> NDArray[np.float64]:
        """Seconds to the last token; `nan` where the request did not complete."""
        return np.where(self.completed, self.end_s - self.arrival_s, np.nan)

    @cached_property
    def tpot_s(self) -> NDArray[np.float64]:
        """Mean seconds per token after the first; `nan` where there is none."""
        more = np.where(self.num_output_tokens > 1, self.num_output_tokens - 1.0, np.nan)
        tpot_s: NDArray[np.float64] = (self.e2e_s - self.ttft_s) / more
        return tpot_s

    @cached_property
    def hold_s(self) -> NDArray[np.float64]:
        """Seconds in the gateway before it was sent to the engine that answered."""
        return np.where(self.completed, self.placed_s - self.arrival_s, np.nan)
