"""Which way did one request take: where was it, since when, and how did it end?"""

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from router import Outcome
from router.fleet.replica import ReplicaState

if TYPE_CHECKING:  # who does not trace does not need it
    from opentelemetry.trace import SpanContext

    from serving.gateway.intake.routes import Chosen


class Look(msgspec.Struct, frozen=True):
    """How a model's engines were at one moment, and how many requests were held then."""

    num_held: int
    engines: list[ReplicaState]


class RequestSpan(NamedTuple):
    """A request's own span while it is open: `serving.gateway.observe.tracing`."""

    trace: int  # 128 bits
    id: int  # 64 bits
    is_sampled: bool
    parent: "SpanContext | None"  # of the client

    @property
    def trace_id(self) -> str:
        """The id of its trace, as `traceparent` has it."""
        return f"{self.trace:032x}"


class Journey:
    """What is noted of a request while it is open, for metrics, its line in the log and its trace.

    Times are seconds of the monotonic clock; 0 where it never came so far.
    """

    __slots__ = (
        "answered_by",
        "cache",
        "chosen",
        "first_token_s",
        "held_by",
        "outcome",
        "over_s",
        "places",
        "predicted_ttft_s",
        "reason",
        "span",
    )

    def __init__(self) -> None:
        self.places: list[tuple[str, float]] = []  # engines and providers, and when it was sent
        self.chosen: Chosen | None = None  # by a route; None where the client named the model
        self.cache = ""  # how the response cache took it
        self.held_by: Look | None = None  # the first time that no engine had room for it
        self.answered_by = ""  # the place of the first token
        self.predicted_ttft_s: float | None = None  # there, from when it was sent there
        self.first_token_s = 0.0
        self.over_s = 0.0
        self.outcome: Outcome | None = None  # None while it is open, and where it never was
        self.reason = ""  # why it was refused or failed
        self.span: RequestSpan | None = None  # of its trace, where there is one

    def forget_place(self, place: str) -> None:
        """Forget the last time that it was sent there: it was given back unread."""
        for index in reversed(range(len(self.places))):
            if self.places[index][0] == place:
                del self.places[index]
                return

    @property
    def sent_s(self) -> float:
        """When it was first sent to an engine or provider; 0 if it never was."""
        return self.places[0][1] if self.places else 0.0

    @property
    def last_place(self) -> str:
        """Where it was sent last; empty if nowhere."""
        return self.places[-1][0] if self.places else ""

    @property
    def answered_in_s(self) -> float | None:
        """Seconds to the first token from when its place was sent the request; None without one."""
        if not self.first_token_s:
            return None
        place, sent_s = self.places[-1]
        if place == self.answered_by and sent_s <= self.first_token_s:
            return self.first_token_s - sent_s  # the usual case
        for place, sent_s in reversed(self.places):
            if place == self.answered_by and sent_s <= self.first_token_s:
                return self.first_token_s - sent_s
        return None

    def time_per_token_s(self, num_output_tokens: int, num_sequences: int) -> float | None:
        """Return the mean seconds per token after the first; None where there is no telling."""
        num_more = num_output_tokens / num_sequences - 1.0
        if not self.first_token_s or num_more <= 0.0:
            return None
        return (self.over_s - self.first_token_s) / num_more
