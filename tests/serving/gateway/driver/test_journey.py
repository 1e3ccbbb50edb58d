"""What the driver notes of a request's way: where it was sent, its first token, how it ended."""

import pytest

from router import Dispatch, Fail, Fallback, Outcome, Reject, RejectReason
from serving.gateway.exchange import EngineFailed
from serving.stream.frames import Data, End, Head
from tests.serving.gateway.driver.world import HEADERS, NOW_S, USAGE, record


async def test_a_request_that_is_answered(world):
    exchange = world.exchange()
    world.replies["router.on_arrival"] = [Dispatch("a", "r0", 1), Dispatch("a", "r1", 1)]
    world.driver.open(exchange)
    journey = exchange.journey
    assert journey.places == [("r0", NOW_S), ("r1", NOW_S)]
    assert (journey.sent_s, journey.first_token_s, journey.outcome) == (NOW_S, 0.0, None)
    assert journey.answered_in_s is None


async def test_what_is_given_back_was_not_there(world):
    """Which may be the first of two that have it, or for the second time."""
    exchange = world.exchange()
    places = ("r0", "r1", "r0", "r2")
    world.replies["router.on_arrival"] = [Dispatch("a", place, 1) for place in places]
    world.driver.open(exchange)
    exchange.journey.forget_place("r0")
    assert [place for place, _ in exchange.journey.places] == ["r0", "r1", "r2"]
    exchange.journey.forget_place("r0")
    exchange.journey.forget_place("r0")
    assert [place for place, _ in exchange.journey.places] == ["r1", "r2"]


async def test_a_first_token_and_the_end(world):
    exchange = world.opened(num_attempts=1)
    [attempt] = exchange.attempts
    world.driver.on_head(attempt, Head(1, 200, HEADERS))
    world.driver.on_data(attempt, Data(1, b"x", record(1)))
    journey = exchange.journey
    assert (journey.first_token_s, journey.predicted_ttft_s) == (NOW_S, 0.25)
    assert journey.answered_by == "r0"
    assert journey.outcome is None
    world.driver.on_end(attempt, End(1, USAGE, None))
    assert (journey.outcome, journey.over_s, journey.reason) == (Outcome.COMPLETED, NOW_S, "")


async def test_an_error_is_no_first_token(world):
    exchange = world.opened(num_attempts=1)
    [attempt] = exchange.attempts
    world.driver.on_head(attempt, Head(1, 400, HEADERS))
    world.driver.on_data(attempt, Data(1, b"x", record(1)))
    assert exchange.journey.first_token_s == 0.0


@pytest.mark.parametrize(
    ("decision", "outcome", "reason"),
    [
        (Reject("a", RejectReason.QUEUE_FULL, 1.0), Outcome.REJECTED, "queue_full"),
        (Reject("a", RejectReason.EXPIRED, None), Outcome.EXPIRED, "expired"),
        (Fail("a"), Outcome.FAILED, "it was lost"),
    ],
)
async def test_a_request_that_is_not_answered(world, decision, outcome, reason):
    exchange = world.exchange()
    exchange.failure = "it was lost"
    world.replies["router.on_arrival"] = [decision]
    world.driver.open(exchange)
    assert (exchange.journey.outcome, exchange.journey.reason) == (outcome, reason)
    assert exchange.journey.places == []
    assert exchange.journey.sent_s == 0.0


async def test_a_request_whose_client_leaves(world):
    exchange = world.opened()
    world.driver.cancel(exchange)
    assert exchange.journey.outcome is Outcome.RENEGED
    assert exchange.journey.reason == "the client left"


async def test_a_request_that_a_provider_gets(world):
    exchange = world.exchange()
    world.replies["router.on_arrival"] = [Fallback("a", "p0", "k")]
    world.driver.open(exchange)
    assert exchange.journey.answered_by == ""
    assert exchange.journey.places == [("provider p0", NOW_S)]
    world.driver.on_provider_first_byte(exchange)
    assert exchange.journey.first_token_s == NOW_S
    assert exchange.journey.answered_by == "provider p0"
    world.driver.break_off(exchange, EngineFailed("ours"))
    assert exchange.journey.outcome is Outcome.RENEGED  # as the router counts it


async def test_an_answer_is_timed_from_when_its_engine_was_asked(world):
    journey = world.exchange().journey
    journey.places = [("r0", 1.0), ("r1", 4.0), ("r0", 5.0), ("r2", 5.5), ("r0", 9.0)]
    journey.first_token_s, journey.answered_by = 6.0, "r0"  # r2 was a hedge
    assert (journey.sent_s, journey.answered_in_s) == (1.0, 1.0)
