"""What is predicted of a request before an engine is chosen, and how far off is any prediction?"""

from collections import deque

import msgspec

from router.estimators.accuracy import Accuracy, AccuracyState
from router.estimators.lengths.forecast import Forecast, Lengths
from router.estimators.output_length import OutputLengths
from router.scheduling.attempt import Attempt
from router.types import Request, Usage

_NUM_RECENT = 32


class ForecastState(msgspec.Struct, frozen=True, kw_only=True):
    """How long one request's answer was expected to be when the request came."""

    id: str
    model: str
    num_expected_tokens: int  # of one sequence, the mean
    num_booked_tokens: int  # what KV room is kept for
    quantiles: tuple[int, ...]  # at `router.estimators.lengths.distribution.LEVELS`
    cut_share: float  # probability that it ends at the client's own limit


class LengthsState(msgspec.Struct, frozen=True, kw_only=True):
    """What is expected of answers' lengths."""

    coverage: dict[str, float]  # by model: late answers within their 80 % interval, 0-1
    recent: list[ForecastState]  # of the last requests, the oldest first


class PredictionsState(msgspec.Struct, frozen=True, kw_only=True):
    """How far predicted times were off, since the policy was chosen."""

    ttft: AccuracyState  # from placing to the first token
    tpot: AccuracyState  # per output token after the first
    latency: AccuracyState  # from placing to the end


class Predictions:
    """Lengths of answers before they begin, and the errors of predicted times."""

    def __init__(self, max_error: float) -> None:
        """Past `max_error`, the median relative error of first tokens, predictions are bad.

        Until they are twice as good, so that what depends on it does not alternate.
        """
        self._max_error = max_error
        self.lengths: Lengths = OutputLengths()
        self._recent: deque[tuple[Request, Forecast]] = deque(maxlen=_NUM_RECENT)
        self.restart()

    def restart(self) -> None:
        """Forget the errors so far: another policy places otherwise."""
        self._are_bad = False
        self._accuracy = _accuracies()
        self._accuracy_by_model: dict[str, dict[str, Accuracy]] = {}

    @property
    def are_bad(self) -> bool:
        """Whether predicted first tokens are too far off to order requests by."""
        error = self._accuracy["ttft"].error_p50
        if error is not None:
            self._are_bad = error > (self._max_error / 2.0 if self._are_bad else self._max_error)
        return self._are_bad

    def on_arrival(
        self, request: Request, prefill_s_per_token: float, *, has_length: bool
    ) -> Request:
        """Return the request with the seconds per prompt token and the predicted answer length.

        Without `has_length` the length that it has stays.
        """
        if not has_length:
            return msgspec.structs.replace(request, prefill_s_per_token=prefill_s_per_token)
        forecast = self.lengths.forecast(request)
        self._recent.append((request, forecast))
        return msgspec.structs.replace(
            request,
            num_expected_output_tokens=forecast.num_expected_tokens,
            num_booked_output_tokens=forecast.num_booked_tokens,
            prefill_s_per_token=prefill_s_per_token,
        )

    def on_first_token(self, attempt: Attempt, now_s: float) -> None:
        """Compare a first token with its prediction; learn the overhead outside of steps."""
        ttft_s = now_s - attempt.placed_s
        self._compare("ttft", attempt, attempt.predicted_ttft_s, ttft_s)
        steps_s = attempt.predicted_ttft_s - attempt.overhead_s
        attempt.replica.request_overhead.learn(ttft_s - steps_s)

    def on_finish(self, attempt: Attempt, usage: Usage, now_s: float) -> None:
        """Learn from a complete answer how long such answers are; compare its predicted times."""
        if not usage.num_output_tokens:
            return
        request, first_s = attempt.request, attempt.first_token_s
        if self.lengths.wants(request, now_s):
            self.lengths.learn(request, usage.num_output_tokens)
        took_s = now_s - attempt.placed_s
        self._compare("latency", attempt, attempt.predicted_latency_s, took_s)
        num_more = usage.num_output_tokens / request.num_sequences - 1.0
        if first_s is not None and first_s < now_s and num_more > 0.0:
            self._compare("tpot", attempt, attempt.predicted_tpot_s * num_more, now_s - first_s)

    def _compare(self, kind: str, attempt: Attempt, predicted_s: float, took_s: float) -> None:
        """Compare a predicted time with what it was, of all models and of the request's own."""
        self._accuracy[kind].add(predicted_s, took_s)
        model = attempt.replica.info.model
        own = self._accuracy_by_model.get(model)
        if own is None:
            own = self._accuracy_by_model[model] = _accuracies()
        own[kind].add(predicted_s, took_s)

    def lengths_state(self) -> LengthsState:
        """Return what was expected of the last requests, and how good that is."""
        return LengthsState(
            coverage=self.lengths.coverage(),
            recent=[
                ForecastState(
                    id=request.id,
                    model=request.model,
                    num_expected_tokens=forecast.num_expected_tokens,
                    num_booked_tokens=forecast.num_booked_tokens,
                    quantiles=forecast.quantiles,
                    cut_share=forecast.cut_share,
                )
                for request, forecast in self._recent
            ],
        )

    def state(self) -> PredictionsState:
        """Return the errors of each predicted time."""
        return _state(self._accuracy)

    def state_by_model(self) -> dict[str, PredictionsState]:
        """Return the same of each model, by its own name."""
        if len(self._accuracy_by_model) == 1:  # it costs as much again
            return dict.fromkeys(self._accuracy_by_model, self.state())
        return {model: _state(own) for model, own in self._accuracy_by_model.items()}


def _accuracies() -> dict[str, Accuracy]:
    """Return what compares: from placing to the first token, per output token, to the end."""
    return {"ttft": Accuracy(), "tpot": Accuracy(), "latency": Accuracy()}


def _state(accuracies: dict[str, Accuracy]) -> PredictionsState:
    return PredictionsState(**{name: each.state() for name, each in accuracies.items()})
