"""How soon would a model's engines answer a request, as things are now?"""

import msgspec

from router.core.settings import RouterSettings
from router.fleet.admission import kv_need_tokens
from router.fleet.fleet import Fleet
from router.queueing.deadline import edf_key_s, ttft_deadline_s
from router.queueing.hold_queue import HoldQueue
from router.scheduling.predictions import Predictions
from router.scheduling.wait_time import WaitEstimator
from router.types import Request


class Outlook(msgspec.Struct, frozen=True):
    """What is predicted of one request at one model, seconds from now."""

    ttft_s: float
    end_s: float
    target_s: float  # by when the first token is due
    is_measured: bool  # else by a guess of how fast the engine is


class Outlooks:
    """Predicts by what the router goes by itself: each model's engines, its queue, its answers.

    By the engine that lacks the least for the request, and behind what waits for the model.
    Without the prefix that an engine may have cached: that is known once the model is.
    """

    def __init__(
        self,
        fleet: Fleet,
        queue: HoldQueue,
        waits: WaitEstimator,
        predictions: Predictions,
        settings: RouterSettings,
    ) -> None:
        self._fleet = fleet
        self._queue = queue
        self._waits = waits
        self._predictions = predictions
        self._settings = settings

    def is_live(self, model: str) -> bool:
        """Whether an engine of the model may be sent work."""
        return self._fleet.any_works(model)

    def of(self, request: Request, now_s: float) -> Outlook | None:
        """Return what is to be expected of `request.model`; None if it has no live engine."""
        forecast = self._predictions.lengths.forecast(request)
        request = msgspec.structs.replace(
            request,
            num_expected_output_tokens=forecast.num_expected_tokens,
            num_booked_output_tokens=forecast.num_booked_tokens,
            prefill_s_per_token=self._fleet.prefill_s_per_token(request.model),
        )
        engine = self._fleet.readiest(request.model, kv_need_tokens(request), set())
        if engine is None:
            return None
        key_s = edf_key_s(request, self._settings)
        ttft_s = engine.ttft_s(engine.num_new_tokens(request), now_s, key_s)
        if request.model in self._queue.num_tokens_by_model:
            num_before = self._queue.num_tokens_before(request)
            ttft_s = max(ttft_s, self._waits.first_token_s(request, num_before))
        ttft_s += engine.request_overhead.usual_s
        num_more = forecast.num_expected_tokens - 1
        return Outlook(
            ttft_s=ttft_s,
            end_s=ttft_s + num_more * engine.tpot_s(request.num_sequences),
            target_s=ttft_deadline_s(request, self._settings) - now_s,
            is_measured=engine.predictor.is_warm,
        )
