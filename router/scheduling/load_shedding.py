r"""Who is refused while more comes than can be answered in time.

    calm --somebody would be later than `max_late_s`--> overloaded
      ^                                                  |  whoever would be late is refused
      \--nobody refused for `max_late_s`-----------------/

A queue takes up bursts. Where one stands it only makes everybody late, and for good:
what is late comes first in it (earliest deadline first is poor in overload;
Locke 1986). So a burst is let in, and late if need be; past that, only as much
is let in as its promise allows, and the engines answer as many as ever, in time
(what CoDel does for packets; Nichols and Jacobson 2012).

Not refused, ever: what an engine has room for now, what an engine has failed
already, and anybody while no engine of the model works, for then nothing is known.
"""

import math

from router.fleet.fleet import Fleet
from router.queueing.deadline import edf_key_s
from router.queueing.hold_queue import HoldQueue
from router.scheduling.entry_share import AdmissionShare
from router.scheduling.wait_time import WaitEstimator
from router.settings import RouterSettings
from router.types import Request

# How much longer than predicted a wait in the queue is taken to be. Predictions are off by
# 15 % in the median and by 43 % at p90 (bench-real), and what comes later and is promised
# sooner passes. Engines do not run dry for it: they have the next step while one runs
# (`router.fleet.admission`).
_SAFETY = 2.0
# OpenAI's own clients come back by `Retry-After` up to a minute, and by their own mind past it.
_MAX_RETRY_AFTER_S = 60.0


class OverloadState:
    """One model's."""

    __slots__ = ("_max_late_s", "_return_s", "_until_s", "share")

    def __init__(self, max_late_s: float) -> None:
        self.share = AdmissionShare(max_late_s)
        self._max_late_s = max_late_s
        self._until_s = -math.inf
        self._return_s = -math.inf  # when the last one that was refused is to come back

    def is_on(self, now_s: float) -> bool:
        """Whether whoever would be late is refused."""
        return now_s < self._until_s

    def refuse_s(self, late_s: float, service_s: float, now_s: float) -> float | None:
        """In how many seconds a newcomer is to come back; None if it may stay.

        It would be `late_s` late, or in time if negative, and takes `service_s` of all
        engines together. Those that are refused are told to come back one after the
        other, as they would have been served: all at once, they would be refused again.
        """
        if late_s <= (0.0 if self.is_on(now_s) else self._max_late_s):
            return None
        self._until_s = now_s + self._max_late_s
        self._return_s = min(
            max(self._return_s, now_s + late_s) + service_s, now_s + _MAX_RETRY_AFTER_S
        )
        return self._return_s - now_s


class LoadShedder:
    """That of each model, judged by what is held and by what engines can do."""

    def __init__(
        self, fleet: Fleet, queue: HoldQueue, waits: WaitEstimator, settings: RouterSettings
    ) -> None:
        self._fleet = fleet
        self._queue = queue
        self._waits = waits
        self._settings = settings
        self._by_model: dict[str, OverloadState] = {}

    def refuse_s(self, request: Request, now_s: float) -> float | None:
        """In how many seconds a request that has to wait is to come back; None if it may stay."""
        max_late_s = self._settings.max_late_s
        if max_late_s is None or request.tried:
            return None
        model, tenant = request.model, request.tenant
        num_engines, tokens_per_s = self._fleet.prefill_rate(model)
        if not num_engines:
            return None
        overload = self._by_model.get(model)
        if overload is None:
            overload = self._by_model[model] = OverloadState(max_late_s)
        is_on = overload.is_on(now_s)
        own_s = request.num_prompt_tokens * num_engines / tokens_per_s
        # By its turn, which is never after its promise: by promises alone, long prompts would be
        # let in until only they had time to wait for one another. And a promise that no engine
        # could keep makes nobody late who waits no longer than its own prompt takes.
        slack_s = max(edf_key_s(request, self._settings) - now_s - own_s, own_s)
        others_s = overload.share.tokens_ahead(tenant, now_s) / tokens_per_s if is_on else 0.0
        late_s = self._wait_s(model, self._num_tokens(model), is_on) + others_s - slack_s
        if late_s > 0.0:  # look closer: some of what is held comes after this request
            num_tokens = self._queue.num_tokens_before(request)
            late_s = self._wait_s(model, num_tokens, is_on) + others_s - slack_s
        retry_after_s = overload.refuse_s(late_s, own_s / num_engines, now_s)
        if retry_after_s is not None:
            overload.share.refuse(tenant, request.weight, now_s)
        else:
            self.let_in(request, now_s)
        return retry_after_s

    def let_in(self, request: Request, now_s: float) -> None:
        """A request is placed or held."""
        overload = self._by_model.get(request.model)
        if overload is not None and overload.is_on(now_s) and not request.tried:
            num_outputs = request.num_sequences * request.num_expected_output_tokens
            num_tokens = request.num_prompt_tokens + num_outputs
            overload.share.let_in(request.tenant, request.weight, num_tokens, now_s)

    def _num_tokens(self, model: str) -> int:
        return self._queue.num_tokens_by_model.get(model, 0)

    def _wait_s(self, model: str, num_tokens: int, is_on: bool) -> float:
        """Seconds until so many held tokens are prefilled, on the safe side if `is_on`."""
        wait_s = self._waits.sure_wait_s(model, num_tokens)
        if not is_on:
            return wait_s
        engines_s = self._waits.sure_wait_s(model, 0)
        return engines_s + _SAFETY * (wait_s - engines_s)

    def state(self, now_s: float) -> dict[str, bool]:
        """Whether each model is overloaded; JSON-able."""
        return {model: overload.is_on(now_s) for model, overload in self._by_model.items()}
