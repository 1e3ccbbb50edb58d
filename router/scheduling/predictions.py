"""What is predicted of requests besides their way through one engine, and what it was worth."""

import msgspec

from router.estimators.accuracy import Accuracy, AccuracyState
from router.estimators.output_length import OutputLengths
from router.scheduling.placer import Placement
from router.types import Request, Usage


class PredictionsState(msgspec.Struct, frozen=True, kw_only=True):
    """How far predicted times were off, since the policy was chosen."""

    ttft: AccuracyState  # from placing to the first token
    tpot: AccuracyState  # per output token after the first
    latency: AccuracyState  # from placing to the end


class Predictions:
    """Answer lengths before they begin, and how far predicted times were off.

    `max_error` is the median relative error of first tokens past which
    predictions count as bad, until they are twice as good: so that what goes by
    that does not swing.
    """

    def __init__(self, max_error: float) -> None:
        self._max_error = max_error
        self._lengths = OutputLengths()
        self.restart()

    def restart(self) -> None:
        """Compare anew from here on: another policy places otherwise."""
        self._are_bad = False
        # From placing: to the first token, per output token, to the end.
        self._accuracy = {"ttft": Accuracy(), "tpot": Accuracy(), "latency": Accuracy()}

    @property
    def are_bad(self) -> bool:
        """Whether predicted first tokens say too little to order requests by."""
        error = self._accuracy["ttft"].error_p50
        if error is not None:
            self._are_bad = error > (self._max_error / 2.0 if self._are_bad else self._max_error)
        return self._are_bad

    def on_arrival(
        self, request: Request, prefill_s_per_token: float, *, has_length: bool
    ) -> Request:
        """The request with what its prompt takes and, unless not wanted, how long its answer is."""
        if has_length:
            num_output_tokens = self._lengths.predict(request)
        else:
            num_output_tokens = request.num_expected_output_tokens
        return msgspec.structs.replace(
            request,
            num_expected_output_tokens=num_output_tokens,
            prefill_s_per_token=prefill_s_per_token,
        )

    def on_first_token(self, placement: Placement, now_s: float) -> None:
        """Compare a first token with its prediction, and learn what comes on top of steps."""
        ttft_s = now_s - placement.placed_s
        self._accuracy["ttft"].add(placement.predicted_ttft_s, ttft_s)
        placement.replica.path.learn(ttft_s - (placement.predicted_ttft_s - placement.path_s))

    def on_finish(self, placement: Placement, usage: Usage, now_s: float) -> None:
        """Learn from a complete answer how long such answers are, and how fast they come."""
        if not usage.num_output_tokens:
            return
        request, first_s = placement.request, placement.first_token_s
        self._lengths.learn(request, usage.num_output_tokens)
        self._accuracy["latency"].add(placement.predicted_latency_s, now_s - placement.placed_s)
        num_more = usage.num_output_tokens / request.num_sequences - 1.0
        if first_s is not None and first_s < now_s and num_more > 0.0:
            self._accuracy["tpot"].add(placement.predicted_tpot_s, (now_s - first_s) / num_more)

    def state(self) -> PredictionsState:
        """Return the errors of each predicted time."""
        return PredictionsState(**{name: each.state() for name, each in self._accuracy.items()})
