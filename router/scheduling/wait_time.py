"""How long who joins the hold queue now will wait, as predicted."""

import math
from collections.abc import Mapping

from router.estimators.queue_drain import DepartureRate
from router.fleet.fleet import Fleet
from router.queueing.hold_queue import HoldQueue
from router.types import Request


class WaitEstimator:
    """Waits by what engines can prefill and by what they have in fact taken: the longer counts.

    The first knows of engines that have just come or gone, the second of whatever
    else engines are short of.
    """

    def __init__(self, fleet: Fleet, queue: HoldQueue) -> None:
        self._fleet = fleet
        self._queue = queue
        self._drains: dict[str, DepartureRate] = {}
        self._was_any_waiting = False

    def took(self, num_tokens_by_model: Mapping[str, int], now_s: float) -> None:
        """Engines have just taken so many prompt tokens from the hold queue."""
        waiting = self._queue.num_tokens_by_model
        if not (waiting or num_tokens_by_model or self._was_any_waiting):
            return  # the usual case
        self._was_any_waiting = bool(waiting)
        for model in self._drains.keys() | waiting.keys() | num_tokens_by_model.keys():
            drain = self._drains.get(model)
            if drain is None:
                drain = self._drains[model] = DepartureRate(now_s)
            drain.advance(num_tokens_by_model.get(model, 0), model in waiting, now_s)

    def wait_s(self, model: str, num_tokens: int) -> float:
        """Predicted seconds until engines have prefilled so many held tokens; inf if none can."""
        drain_s = self._fleet.drain_s(model, num_tokens)
        if drain_s is None:
            return math.inf
        drain = self._drains.get(model)
        if drain is None:
            return drain_s
        return max(drain_s, drain.wait_s(num_tokens))

    def first_token_s(self, request: Request, num_tokens_before: int) -> float:
        """Predicted seconds to a held request's first token, so many held tokens before it.

        What has left the queue at its own rate still passes what engines have; and what
        comes first is spread over all of them, while its own prompt is for one. There it
        is computed side by side with what comes before it, but in no more than its part of
        a step.
        """
        wait_s = self.wait_s(request.model, num_tokens_before)
        engines_s = self._fleet.drain_s(request.model, 0)
        if engines_s is None:
            return wait_s
        if (drain := self._drains.get(request.model)) is not None:
            wait_s = max(wait_s, engines_s + drain.wait_s(num_tokens_before))
        own_s = request.num_prompt_tokens * self._fleet.prefill_s_per_token(request.model)
        steps_s = self._fleet.full_steps_s(request.model, request.num_prompt_tokens)
        return wait_s + max(own_s, steps_s - engines_s)

    def sure_wait_s(self, model: str, num_tokens: int) -> float:
        """The same, but nothing is concluded from a queue that hardly anything has left yet."""
        drain = self._drains.get(model)
        if drain is not None and drain.is_sure:
            return self.wait_s(model, num_tokens)
        drain_s = self._fleet.drain_s(model, num_tokens)
        return math.inf if drain_s is None else drain_s
