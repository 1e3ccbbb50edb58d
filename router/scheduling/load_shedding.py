r"""Who is refused while more requests come than can be answered in time?

    calm --a request would be later than `max_late_s`--> overloaded
      ^                                                    |  every late request is refused
      \--no request refused for `max_late_s`---------------/

A queue absorbs bursts. One that stands only makes everybody late, and for good, because
what is late comes first in it (earliest deadline first is poor in overload;
Locke 1986). So a burst is admitted, and late if need be. Past that, only as much
is admitted as can meet its deadline, and the engines answer as many requests as ever, in
time (what CoDel does for packets; Nichols and Jacobson 2012).

Never refused: what an engine has room for now, what an engine has failed already, and
anything while no engine of the model works, because then nothing is known.
"""

import math

from router.core.settings import RouterSettings
from router.fleet.fleet import Fleet
from router.queueing.deadline import unshifted_edf_key_s
from router.queueing.hold_queue import HoldQueue
from router.scheduling.wait_time import WaitEstimator
from router.types import Request

# How much longer than predicted a wait in the queue is taken to be. Predictions are off by
# 15 % in the median and by 43 % at p90 (bench-real), and what comes later with an earlier
# deadline passes. Engines do not run dry because of it: they have the next step while one runs
# (`router.fleet.admission`).
_SAFETY = 2.0
# OpenAI's own clients come back by `Retry-After` up to a minute, and by their own choice past it.
_MAX_RETRY_AFTER_S = 60.0


class AdmissionShare:
    """Tokens admitted over weight, by tenant; a tenant that is ahead has to wait for the others.

    Start-time fair queueing as in `router.queueing.fair_share`, which is fair among tenants
    that wait in the queue. While newcomers are refused the queue is too short for that, so
    fairness has to be in admission: the tenants that were refused lately stand for those
    that would wait.
    """

    __slots__ = ("_memory_s", "_refused", "_virtual_times")

    def __init__(self, memory_s: float) -> None:
        """A tenant that has not been refused for `memory_s` gets all that it asks for."""
        self._memory_s = memory_s
        self._virtual_times: dict[str, float] = {}
        self._refused: dict[str, tuple[float, float]] = {}  # when last, and the tenant's weight

    def tokens_ahead(self, tenant: str, now_s: float) -> float:
        """Return the tokens of others to be admitted before a tenant is level with them."""
        others = [
            (self._virtual_times[name], weight)
            for name, (refused_s, weight) in self._refused.items()
            if name != tenant and now_s - refused_s < self._memory_s
        ]
        if not others:
            return 0.0
        lead = self._virtual_times.get(tenant, -math.inf) - min(time for time, _ in others)
        return max(0.0, lead) * sum(weight for _, weight in others)

    def record_admitted(self, tenant: str, weight: float, num_tokens: int, now_s: float) -> None:
        """Count a request of so many tokens that was admitted."""
        self._virtual_times[tenant] = self._virtual_time(tenant, now_s) + num_tokens / weight

    def record_refused(self, tenant: str, weight: float, now_s: float) -> None:
        """Note that a request was refused: its tenant asks for more than it gets."""
        self._virtual_times[tenant] = self._virtual_time(tenant, now_s)
        self._refused[tenant] = now_s, weight

    def _virtual_time(self, tenant: str, now_s: float) -> float:
        """Return a tenant's virtual time; having asked for less than a share earns no credit."""
        self._forget(now_s)
        virtual_time = self._virtual_times.get(tenant, 0.0)
        if tenant in self._refused:
            return virtual_time
        lowest = min((self._virtual_times[name] for name in self._refused), default=0.0)
        return max(virtual_time, lowest)

    def _forget(self, now_s: float) -> None:
        for name, (refused_s, _) in list(self._refused.items()):
            if now_s - refused_s >= self._memory_s:
                del self._refused[name]
        if not self._refused:
            self._virtual_times.clear()


class OverloadState:
    """Whether one model is overloaded, and when those that it refuses are to come back."""

    __slots__ = ("_max_late_s", "_return_s", "_until_s", "share")

    def __init__(self, max_late_s: float) -> None:
        self.share = AdmissionShare(max_late_s)
        self._max_late_s = max_late_s
        self._until_s = -math.inf
        self._return_s = -math.inf  # when the last one that was refused is to come back

    def is_on(self, now_s: float) -> bool:
        """Whether every request that would be late is refused."""
        return now_s < self._until_s

    def refuse_if_late(self, late_s: float, service_s: float, now_s: float) -> float | None:
        """Return in how many seconds a request is to come back; None if it is not refused.

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
    """Refuses requests of overloaded models, by what is held and by what engines can do."""

    def __init__(
        self, fleet: Fleet, queue: HoldQueue, waits: WaitEstimator, settings: RouterSettings
    ) -> None:
        self._fleet = fleet
        self._queue = queue
        self._waits = waits
        self._settings = settings
        self._by_model: dict[str, OverloadState] = {}

    def refuse_if_late(self, request: Request, now_s: float) -> float | None:
        """Refuse a request that would be too late, or count it as admitted.

        Return in how many seconds it is to come back, None if it is admitted.
        """
        max_late_s = self._settings.max_late_s
        if max_late_s is None or request.was_placed:
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
        # By its EDF key, which is never after its TTFT deadline: by deadlines alone, long prompts
        # would be admitted until only they had time to wait for one another. And a TTFT target
        # that no engine could meet makes nobody late who waits no longer than its own prompt takes.
        slack_s = max(unshifted_edf_key_s(request, self._settings) - now_s - own_s, own_s)
        others_s = overload.share.tokens_ahead(tenant, now_s) / tokens_per_s if is_on else 0.0
        late_s = self._wait_s(model, self._num_tokens(model), is_on) + others_s - slack_s
        if late_s > 0.0:  # look closer: some of what is held comes after this request
            num_tokens = self._queue.num_tokens_before(request)
            late_s = self._wait_s(model, num_tokens, is_on) + others_s - slack_s
        retry_after_s = overload.refuse_if_late(late_s, own_s / num_engines, now_s)
        if retry_after_s is not None:
            overload.share.record_refused(tenant, request.weight, now_s)
        else:
            self.record_admitted(request, now_s)
        return retry_after_s

    def record_admitted(self, request: Request, now_s: float) -> None:
        """Count a request that is placed or held, with its prompt and its predicted output."""
        overload = self._by_model.get(request.model)
        if overload is not None and overload.is_on(now_s) and not request.was_placed:
            num_outputs = request.num_sequences * request.num_expected_output_tokens
            num_tokens = request.num_prompt_tokens + num_outputs
            overload.share.record_admitted(request.tenant, request.weight, num_tokens, now_s)

    def _num_tokens(self, model: str) -> int:
        return self._queue.num_tokens_by_model.get(model, 0)

    def _wait_s(self, model: str, num_tokens: int, is_on: bool) -> float:
        """Return the seconds until so many held tokens are prefilled; if `is_on`, with safety."""
        wait_s = self._waits.sure_wait_s(model, num_tokens)
        if not is_on:
            return wait_s
        engines_s = self._waits.sure_wait_s(model, 0)
        return engines_s + _SAFETY * (wait_s - engines_s)

    def is_overloaded_by_model(self, now_s: float) -> dict[str, bool]:
        """Return whether each model is overloaded."""
        return {model: overload.is_on(now_s) for model, overload in self._by_model.items()}
