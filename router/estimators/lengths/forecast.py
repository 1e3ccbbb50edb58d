"""What is said of an answer's length, and who says it?"""

import msgspec

from router.types import Request


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """The length of one sequence of an answer, tokens, before it has begun."""

    num_expected_tokens: int  # the mean
    num_booked_tokens: int  # what KV room is kept for
    quantiles: tuple[int, ...] = ()  # at `LEVELS`; none of a source that knows no more
    cut_share: float = 0.0  # probability that it ends at the client's own limit


# Of `Forecast.quantiles`. Two each bound the intervals of 95, 80 and 50 %.
LEVELS = (0.025, 0.1, 0.25, 0.5, 0.75, 0.9, 0.975)


class Lengths:
    """A source of forecasts, which learns from what came."""

    def forecast(self, request: Request) -> Forecast:
        """Return what is to be expected; no more than the client's own limit."""
        raise NotImplementedError

    def learn(self, request: Request, num_output_tokens: int) -> None:
        """Learn from the tokens of a complete answer, all its sequences together."""
        raise NotImplementedError
