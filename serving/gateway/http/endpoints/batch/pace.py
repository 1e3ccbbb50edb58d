"""How many lines of batches may be open at a time? As many as fill the gaps, and hardly more.

While nobody else has requests open, engines are filled: lines are added while the router finds
them an engine, and a few wait in its hold queue, so that room is taken at once. While others have,
batches get a share of each engine's time, `max_slowdown`. A line costs an engine

    decode_s per step while it decodes, and token_s per token of its prompt once

so that with `n` of them there, each for `line_s`, in steps of `step_s`, they take the share

    n * (decode_s / step_s + prompt_tokens * token_s / line_s)

Whoever loses a share of the time is there for longer, and so are more of them, which makes steps
longer again: what others lose at first grows, like a geometric series, by step_s / step_base_s. So
much less is given to lines.

What a step costs is learned by the router, what a line is like from those that have ended.
"""

import math
from collections.abc import Iterable

from router.fleet.replica import ReplicaState

# Others come and go: so long after the last one it is taken that the next one is near.
_BUSY_S = 10.0
# What a line is like: of the last 64 or so. The guess decides nothing but the first few.
_MEMORY = 1.0 / 64.0
_GUESS_TOKENS, _GUESS_LINE_S = 500.0, 5.0
# Per look. From a line per engine to 256 takes 14 looks; a queue of lines halves in 3.
_GROWTH, _SHRINKAGE = 1.5, 0.8


class Pace:
    """How many lines this gateway may have open now: `limit`. No clock: times are told."""

    def __init__(self, max_inflight: int | None, max_slowdown: float) -> None:
        self._max_inflight = max_inflight
        self._max_slowdown = max_slowdown
        self._busy_until_s = -math.inf
        self._num_tokens = _GUESS_TOKENS
        self._line_s = _GUESS_LINE_S
        self.limit = 1
        self.is_busy = False  # others have requests open, or had lately

    def record_line(self, num_prompt_tokens: int, line_s: float) -> None:
        """Learn from a line that was answered: tokens to prefill, and how long it took."""
        self._num_tokens += _MEMORY * (num_prompt_tokens - self._num_tokens)
        self._line_s += _MEMORY * (line_s - self._line_s)

    def look(
        self,
        replicas: Iterable[ReplicaState],
        *,
        num_held: int,
        has_others: bool,
        num_lines: int,
        num_feeders: int,
        now_s: float,
    ) -> None:
        """Set the limit by the engines, by who waits, and by what is open.

        `num_held` requests wait in the hold queue, lines among them; `num_lines` lines are open,
        and with `has_others` requests that are no batch work. `num_feeders` gateways send lines to
        the same engines.
        """
        engines = [each for each in replicas if not each.is_draining]
        if has_others:
            self._busy_until_s = now_s + _BUSY_S
        self.is_busy = now_s < self._busy_until_s
        num_engines = max(1, len(engines))
        limit = float(self.limit)
        if num_held > 2 * num_engines:
            limit = min(limit, num_lines) * _SHRINKAGE
        elif num_held <= num_engines and num_lines >= limit - 1:
            limit = limit * _GROWTH + num_engines
        seats = sum(float(each.info.max_num_seqs) for each in engines) + num_engines
        if self.is_busy:
            seats = min(seats, sum(map(self._seats, engines)) / max(1, num_feeders))
        if self._max_inflight is not None:
            seats = min(seats, self._max_inflight)
        # One is always open, so that it comes of age in the hold queue: no batch starves.
        self.limit = max(1, int(min(limit, seats)))

    def _seats(self, engine: ReplicaState) -> float:
        """Return how many lines may be at an engine that serves others, too."""
        model = engine.step_model
        num_decoding = engine.snapshot.num_decoding_reqs if engine.snapshot is not None else 0
        step_s = max(1e-6, model.step_base_s + model.decode_s * num_decoding)
        share = model.decode_s / step_s + self._num_tokens * model.token_s / max(
            step_s, self._line_s
        )
        growth = step_s / max(1e-6, model.step_base_s)
        return self._max_slowdown / max(1e-9, share * growth)
