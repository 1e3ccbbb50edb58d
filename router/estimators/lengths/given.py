"""What if lengths were known, or known better? For the simulator: what a forecast is worth."""

from collections.abc import Sequence

import msgspec

from router.estimators.lengths.forecast import Forecast, Lengths
from router.types import Request


class GivenLengths(Lengths):
    """Lengths that are given beforehand, per use; for a use without any, what is learned says.

    By the number of the request, which in a simulation is its id.
    """

    def __init__(
        self, learned: Lengths, expected: Sequence[int] | None, booked: Sequence[int] | None
    ) -> None:
        self._learned = learned
        self._expected = expected
        self._booked = booked

    def forecast(self, request: Request) -> Forecast:
        found = self._learned.forecast(request)
        number = int(request.id)
        if self._expected is not None:
            found = msgspec.structs.replace(found, num_expected_tokens=self._expected[number])
        if self._booked is not None:
            found = msgspec.structs.replace(found, num_booked_tokens=self._booked[number])
        return found

    def wants(self, request: Request, now_s: float) -> bool:
        return self._learned.wants(request, now_s)

    def learn(self, request: Request, num_output_tokens: int) -> None:
        self._learned.learn(request, num_output_tokens)
