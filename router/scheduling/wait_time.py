"""How long will a request wait in the hold queue, as predicted?"""

import math
from collections.abc import Mapping

from router.estimators.departure_rate import DepartureRate
from router.fleet.fleet import Fleet
from router.queueing.hold_queue import HoldQueue
from router.types import Request


class WaitEstimator:
    """Waits by what engines can prefill and by what has in fact left the queue: the longer counts.

    The first takes account of engines that have just come or gone, the second of whatever
    else engines are short of.
    """

    def __init__(self, fleet: Fleet, queue: HoldQueue) -> None:
        self._fleet = fleet
        self._queue = queue
        self._departure_rates: dict[str, DepartureRate] = {}  # by model
        self.was_any_waiting = False  # when departures were last recorded

    def record_departures(self, num_tokens_by_model: Mapping[str, int], now_s: float) -> None:
        """Take in how many prompt tokens engines have just taken from the hold queue."""
        waiting = self._queue.num_tokens_by_model
        if not (waiting or num_tokens_by_model or self.was_any_waiting):
            return  # the usual case
        self.was_any_waiting = bool(waiting)
        # A name that no engine knows of has no rate: clients can make up any number of them.
        for models in (waiting, num_tokens_by_model):
            for model in models:
                if model not in self._departure_rates and self._fleet.knows(model):
                    self._departure_rates[model] = DepartureRate(now_s)
        for model, rate in self._departure_rates.items():
            rate.record_departures(num_tokens_by_model.get(model, 0), model in waiting, now_s)

    def wait_s(self, model: str, num_tokens: int) -> float:
        """Return the predicted seconds until engines have prefilled so many held tokens.

        inf if no engine takes work.
        """
        prefill_s = self._fleet.time_to_prefill_s(model, num_tokens)
        if prefill_s is None:
            return math.inf
        rate = self._departure_rates.get(model)
        if rate is None:
            return prefill_s
        return max(prefill_s, rate.wait_s(num_tokens))

    def first_token_s(self, request: Request, num_tokens_before: int) -> float:
        """Return the predicted seconds to a held request's first token, so many tokens before it.

        What leaves the queue at its own rate still comes after what engines have. And what
        comes first is spread over all engines, while a prompt is computed by one: there side
        by side with what comes before it, but in no more than its part of each step.
        """
        wait_s = self.wait_s(request.model, num_tokens_before)
        engines_s = self._fleet.time_to_prefill_s(request.model, 0)
        if engines_s is None:
            return wait_s
        if (rate := self._departure_rates.get(request.model)) is not None:
            wait_s = max(wait_s, engines_s + rate.wait_s(num_tokens_before))
        own_s = request.num_prompt_tokens * self._fleet.prefill_s_per_token(request.model)
        steps_s = self._fleet.full_steps_s(request.model, request.num_prompt_tokens)
        return wait_s + max(own_s, steps_s - engines_s)

    def sure_wait_s(self, model: str, num_tokens: int) -> float:
        """Return `wait_s`, but by prefill rates alone while hardly anything has left the queue."""
        rate = self._departure_rates.get(model)
        if rate is not None and rate.is_sure:
            return self.wait_s(model, num_tokens)
        prefill_s = self._fleet.time_to_prefill_s(model, num_tokens)
        return math.inf if prefill_s is None else prefill_s
