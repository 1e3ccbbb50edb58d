r"""Attempts: engines that have a request, and what each was predicted to take for it.

A request at engines has one attempt, or two while it is hedged:

    dispatched --answers--> answering --first token--> decoding --finishes--> ended
      |  |                      |                         |
      |  \--another attempt at the same request answers first: withdrawn--> ended
      \--fails, or its engine is lost (also from both on the right)-------> ended

While another attempt is left, the request stays with that one; else the router places it
again or gives it up (`router.core.lifecycle`). What never happens: an attempt that has ended
and still holds a booking in the ledger or a call of the breaker.
"""

import msgspec

from router.fleet.fleet import Fleet
from router.fleet.replica import Replica
from router.queueing.hold_queue import HoldQueue
from router.resilience.suspects import PROVEN_TOKENS
from router.types import Request, Usage


class Attempt(msgspec.Struct, eq=False):
    """One engine's try at a request, from its booking to its end."""

    request: Request
    replica: Replica
    booking: int  # in the engine's ledger
    placed_s: float
    predicted_ttft_s: float  # from placing it
    predicted_tpot_s: float
    permit: int  # of the engine's breaker
    overhead_s: float = 0.0  # of the predicted time to first token, what is spent outside of steps
    expects_prompt: bool = False  # the engine has yet to tell of its prompt
    uses_prefix: bool = False  # what it holds of long prompts there is counted
    has_answered: bool = False  # the engine generates; a response may come all at once for all that
    num_steps_at_answer: int = 0  # that the engine had made by then
    is_error: bool = False  # what it answers is an error, of which nothing is learned
    is_alone: bool = False  # a suspect, which had the engine to itself at its prefill
    is_probe: bool = False  # sent to see whether the engine works again
    first_token_s: float | None = None  # when it came

    @property
    def is_fresh(self) -> bool:
        """Whether the engine has not got far with it: if it dies or hangs, this may be why."""
        if not self.has_answered:
            return True
        num_steps = self.replica.snapshot.num_steps_total - self.num_steps_at_answer
        return num_steps < PROVEN_TOKENS  # of which each has given it a token

    def mark_answer(self) -> None:
        """Note that the engine has begun to generate."""
        self.has_answered = True
        self.num_steps_at_answer = self.replica.snapshot.num_steps_total

    @property
    def predicted_latency_s(self) -> float:
        """Predicted seconds from placing the request to the end of its response."""
        num_more = self.request.num_expected_output_tokens - 1
        return self.predicted_ttft_s + num_more * self.predicted_tpot_s


class Attempts:
    """The open attempts, those at the same request in the order in which they were placed."""

    def __init__(self, fleet: Fleet, queue: HoldQueue) -> None:
        self._fleet = fleet
        self._queue = queue
        self._by_request: dict[str, tuple[Attempt, ...]] = {}

    def __len__(self) -> int:
        """Requests at engines."""
        return len(self._by_request)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._by_request

    def add(self, attempt: Attempt) -> None:
        """File a new attempt."""
        request_id = attempt.request.id
        self._by_request[request_id] = (*self._by_request.get(request_id, ()), attempt)

    def of(self, request_id: str) -> tuple[Attempt, ...]:
        """Return the attempts at a request, the oldest first; none if it is at no engine."""
        return self._by_request.get(request_id, ())

    def oldest(self, request_id: str) -> Attempt | None:
        """Return the first of them; None if there is none."""
        attempts = self._by_request.get(request_id)
        return attempts[0] if attempts else None

    def get(self, request_id: str, replica_id: str) -> Attempt | None:
        """Return the attempt of this engine at a request; None if there is none."""
        for attempt in self._by_request.get(request_id, ()):
            if attempt.replica.id == replica_id:
                return attempt
        return None

    def others(self, attempt: Attempt) -> list[Attempt]:
        """Return the other attempts at the same request."""
        return [each for each in self._by_request[attempt.request.id] if each is not attempt]

    def at_replica(self, replica: Replica) -> list[Attempt]:
        """Return the attempts of one engine."""
        return [
            attempt
            for attempts in self._by_request.values()
            for attempt in attempts
            if attempt.replica is replica
        ]

    def unanswered(self) -> list[Attempt]:
        """Return the only attempts at their requests whose engine has not begun to answer."""
        return [
            attempts[0]
            for attempts in self._by_request.values()
            if len(attempts) == 1
            and attempts[0].first_token_s is None
            and not attempts[0].has_answered
        ]

    @property
    def num_hedged(self) -> int:
        """Requests that two engines have."""
        return sum(len(attempts) > 1 for attempts in self._by_request.values())

    def mark_first_token(self, request_id: str, now_s: float) -> Attempt | None:
        """Note the first token of a request; return its attempt, None if it had come before."""
        attempt = self.oldest(request_id)
        if attempt is None or attempt.first_token_s is not None:
            return None
        attempt.first_token_s = now_s
        attempt.replica.end_prefill(request_id)
        return attempt

    def end(self, attempt: Attempt, usage: Usage | None) -> None:
        """Free the booking and the breaker's call; count what it took, if that is known."""
        request, replica = attempt.request, attempt.replica
        if others := tuple(self.others(attempt)):
            self._by_request[request.id] = others
        else:
            del self._by_request[request.id]
        replica.breaker.release_permit(attempt.permit)  # if it had no verdict yet
        replica.release(request.id)
        if replica.adapters is not None:
            replica.adapters.release(request.model)
        if attempt.expects_prompt:
            replica.prefix_cache.confirm_prompt(request)
        if attempt.uses_prefix:
            replica.prefix_cache.release_prompt(request)
        self._fleet.refresh(replica)
        if usage is not None:
            self._queue.record_usage(request, usage)
