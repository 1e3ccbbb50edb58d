"""How long who joins the hold queue now will wait, as predicted."""

import math
from collections.abc import Mapping

from router.drain import Drain
from router.fleet import Fleet
from router.hold import HoldQueue


class Waits:
    """Waits by what engines can prefill, and by what they have in fact taken: the longer counts.

    The first knows of engines that have just come or gone, the second of whatever
    else engines are short of.
    """

    def __init__(self, fleet: Fleet, queue: HoldQueue) -> None:
        self._fleet = fleet
        self._queue = queue
        self._drains: dict[str, Drain] = {}
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
                drain = self._drains[model] = Drain(now_s)
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

    def first_token_s(self, model: str, num_tokens: int) -> float:
        """The same, when what has left the queue has also passed what engines have before it."""
        drain = self._drains.get(model)
        engines_s = self._fleet.drain_s(model, 0)
        if drain is None or engines_s is None:
            return self.wait_s(model, num_tokens)
        return max(self.wait_s(model, num_tokens), engines_s + drain.wait_s(num_tokens))

    def own_s_per_token(self, model: str) -> float:
        """Seconds that a prompt takes by itself, on one engine, per token; 0 if there is none."""
        rates = self._fleet.prefill_rates(model)
        return len(rates) / sum(rates) if rates else 0.0

    def sure_wait_s(self, model: str, num_tokens: int) -> float:
        """The same, but nothing is concluded from a queue that hardly anything has left yet."""
        drain = self._drains.get(model)
        if drain is not None and drain.is_sure:
            return self.wait_s(model, num_tokens)
        drain_s = self._fleet.drain_s(model, num_tokens)
        return math.inf if drain_s is None else drain_s
