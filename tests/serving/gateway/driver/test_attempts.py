"""What the driver tells of engines and providers that try a request."""

import pytest

from router import (
    Fail,
    Failure,
    Hold,
    Withdraw,
)
from router.limits.rate_limit import RateReport
from serving.gateway.providers.continuation import Continuation
from serving.gateway.providers.http_client import ProviderFailed
from serving.stream.frames import Data, End, Head
from tests.serving.gateway.driver.world import HEADERS, NOW_S, USAGE, error_of, record


class TestEngines:
    async def test_answer(self, world):
        exchange = world.opened(num_attempts=1)
        [attempt] = exchange.attempts
        world.driver.on_head(attempt, Head(1, 200, HEADERS))
        assert exchange.status == 0  # not before there is something to say
        world.driver.on_data(attempt, Data(1, b"", record(1)))
        assert (exchange.status, exchange.response_headers) == (200, HEADERS)
        world.driver.on_data(attempt, Data(1, b"x", record(2)))
        world.driver.on_data(attempt, Data(1, b"y", record(3)))
        assert exchange.reply.record == record(1) + record(2) + record(3)
        world.driver.on_end(attempt, End(1, USAGE, None))
        assert world.told == [
            ("router.on_answer", "a", "r0", NOW_S),
            ("metrics.observe_first_token", exchange, NOW_S),
            ("router.on_first_token", "a", NOW_S),
            ("engines.end", attempt),
            ("engines.cancel", attempt),  # a fake leaves it in the list
            ("router.on_finish", "a", USAGE, NOW_S),
        ]
        assert exchange.read() == b"xy"
        assert await error_of(exchange) is None
        assert exchange.usage is USAGE

    async def test_tell_of_progress_before_their_head(self, world):
        exchange = world.opened(num_attempts=1)
        [attempt] = exchange.attempts
        world.driver.on_data(attempt, Data(1, b"", record(1)))
        world.driver.on_head(attempt, Head(1, 201, HEADERS))
        assert (exchange.status, exchange.response_headers) == (201, HEADERS)
        assert attempt.has_answered

    async def test_end_without_a_word(self, world):
        exchange = world.opened(num_attempts=1)
        [attempt] = exchange.attempts
        world.driver.on_end(attempt, End(1, None, None))
        assert [each[0] for each in world.told[:2]] == ["router.on_answer", "engines.end"]
        assert world.told[-1] == ("router.on_finish", "a", None, NOW_S)

    async def test_go_on_with_what_another_has_begun(self, world):
        exchange = world.opened(num_attempts=1)
        exchange.status = 200
        exchange.reply.write(b"before")
        exchange.failed_s = NOW_S - 3.0
        exchange.reply.resume()
        [attempt] = exchange.attempts
        world.driver.on_data(attempt, Data(1, b"x", b""))
        assert ("metrics.observe_resume", exchange.request, 3.0) in world.told
        assert ("router.on_first_token", "a", NOW_S) in world.told

    async def test_answer_with_an_error_that_is_no_first_token(self, world):
        exchange = world.opened(num_attempts=1)
        [attempt] = exchange.attempts
        world.driver.on_head(attempt, Head(1, 400, HEADERS))
        world.driver.on_data(attempt, Data(1, b"no", b""))
        assert exchange.status == 400
        assert not [each for each in world.told if each[0].startswith("metrics")]

    @pytest.mark.parametrize("is_tried_elsewhere", [True, False])
    @pytest.mark.parametrize("status", [400, 500])
    async def test_have_their_errors_judged(self, world, status, is_tried_elsewhere):
        exchange = world.opened(num_attempts=1)
        [attempt] = exchange.attempts
        exchange.reply.receive(b"", record(1, 2))
        if is_tried_elsewhere:
            world.replies["router.failures.on_error_reply"] = [Hold("a")]
        world.driver.on_head(attempt, Head(1, status, HEADERS))
        judged = {
            "status": status,
            "can_retry": True,
            "has_begun": False,
            "num_output_tokens": 2,
        }
        assert world.told == [("router.failures.on_error_reply", "a", "r0", NOW_S, judged)]
        assert (attempt.head is None) == is_tried_elsewhere
        assert (exchange.failure, exchange.failed_s) == (f"it answered {status}", NOW_S)

    async def test_have_errors_within_a_reply_judged(self, world):
        exchange = world.opened(num_attempts=1)
        exchange.reply.receive(b"x", record(1))
        world.driver.on_head(exchange.attempts[0], Head(1, 500, HEADERS))
        judged = world.told[0][-1]
        assert (judged["can_retry"], judged["has_begun"]) == (True, True)

    @pytest.mark.parametrize(
        ("can_retry", "has_begun", "keeps_record", "may"),
        [
            (True, False, True, True),
            (True, True, True, True),
            (True, True, False, False),
            (False, False, True, False),
        ],
    )
    async def test_break_off(self, world, can_retry, has_begun, keeps_record, may):
        exchange = world.opened(num_attempts=1)
        [attempt] = exchange.attempts
        exchange.reply.receive(b"x" if has_begun else b"", record(1, 2, 3))
        if not keeps_record:
            exchange.reply._drop_record()
        world.driver.on_end(attempt, End(1, USAGE, "out of memory", can_retry))
        failed = {
            "can_retry": may,
            "has_begun": has_begun,
            "num_output_tokens": 3 if keeps_record else 0,
        }
        assert world.told == [
            ("engines.end", attempt),
            ("router.failures.on_attempt_failed", "a", "r0", Failure.ERROR, NOW_S, failed),
        ]
        assert (exchange.failure, exchange.failed_s) == ("out of memory", NOW_S)
        assert exchange.usage is None

    async def test_are_lost(self, world):
        exchange = world.opened(num_attempts=1)
        [attempt] = exchange.attempts
        world.driver.on_attempt_lost(attempt)
        failed = {"can_retry": True, "has_begun": False, "num_output_tokens": 0}
        assert world.told == [
            ("engines.end", attempt),
            ("router.failures.on_attempt_failed", "a", "r0", None, NOW_S, failed),
        ]
        assert exchange.failure == "it was lost"

    async def test_are_withdrawn_from_when_another_answers(self, world):
        exchange = world.opened(num_attempts=2)
        world.replies["router.on_answer"] = [Withdraw("a", "r1", 2)]
        world.driver.on_data(exchange.attempts[0], Data(1, b"", record(1)))
        assert ("engines.get", "r1", 2) in world.told


class TestProviders:
    async def test_answer_and_end(self, world):
        exchange = world.opened()
        report = RateReport(limit_requests=3)
        world.driver.on_provider_answer(exchange, report)
        world.driver.on_provider_first_byte(exchange)
        world.driver.on_provider_complete(exchange, USAGE)
        assert world.told == [
            ("router.providers.on_answer", "a", report, NOW_S),
            ("metrics.observe_first_token", exchange, NOW_S),
            ("router.on_first_token", "a", NOW_S),
            ("router.on_finish", "a", USAGE, NOW_S),
        ]
        assert exchange.usage is USAGE
        assert not world.driver.exchanges

    async def test_go_on_with_what_another_has_begun(self, world):
        exchange = world.opened()
        exchange.reply.write(b"x")
        exchange.failed_s = NOW_S - 2.0
        world.driver.on_provider_first_byte(exchange)
        assert world.told == [
            ("metrics.observe_resume", exchange.request, 2.0),
            ("router.on_first_token", "a", NOW_S),
        ]

    async def test_refuse(self, world):
        exchange, report = world.opened(), RateReport(retry_after_s=3.0)
        world.replies["router.providers.on_refused"] = [Hold("a"), Fail("a")]
        world.driver.on_provider_refused(exchange, report)
        assert world.told == [("router.providers.on_refused", "a", report, NOW_S)]
        assert not world.driver.exchanges  # what was decided was done

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"was_sent": False},
            {"lasts": True},
            {"may_be_requests": True},
            {"failure": Failure.TIMEOUT},
        ],
    )
    @pytest.mark.parametrize("has_begun", [True, False])
    async def test_fail(self, world, fields, has_begun):
        exchange = world.opened()
        if has_begun:
            exchange.reply.write(b"x")
        world.driver.on_provider_failed(exchange, ProviderFailed("no", **fields), "p0: no")
        expected = {"was_sent": True, "lasts": False, "may_be_requests": False} | fields
        failure = expected.pop("failure", Failure.ERROR)
        failed = {"can_retry": not has_begun, "num_output_tokens": None, **expected}
        assert world.told == [("router.providers.on_failed", "a", failure, NOW_S, failed)]
        assert (exchange.failure, exchange.failed_s) == ("p0: no", NOW_S)

    @pytest.mark.parametrize(("is_text", "num_tokens"), [(True, 4), (False, None)])
    async def test_fail_in_the_middle(self, world, is_text, num_tokens):
        exchange = world.opened()
        exchange.continuation = Continuation()
        exchange.continuation.num_tokens = 4
        exchange.continuation.is_text = is_text
        world.driver.on_provider_failed(exchange, ProviderFailed("no"), "p0: no")
        assert world.told[0][-1]["num_output_tokens"] == num_tokens
