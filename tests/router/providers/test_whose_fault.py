"""A request that providers answer with 500: whose fault was it? Others' answers tell."""

import pytest

from router.core.router import Router
from router.providers.settings import FallbackSettings, ProviderSettings
from router.resilience.breaker import BreakerState, Failure
from router.resilience.settings import BreakerSettings
from router.types import Dispatch, Fail, Fallback, Usage
from tests.support.builders import fail_attempt, info, make_router, req, snapshot

USAGE = Usage(num_prompt_tokens=10, num_output_tokens=5)


def make(num_replicas: int = 0, **fields) -> Router:
    """Two providers whose first failure opens their breaker, and perhaps engines."""
    router = make_router(num_replicas, breaker=BreakerSettings(max_consecutive_failures=1))
    providers = [
        ProviderSettings.model_validate(
            {
                "name": name,
                "models": {"m": "theirs"},
                "ttft_s": 0.1,
                "breaker": {"max_consecutive_failures": 1, "cooldown_jitter": 0.0},
                **fields,
            }
        )
        for name in ("p0", "p1")
    ]
    router.providers.use(providers, FallbackSettings(), 0.0)
    return router


def is_open(router: Router, name: str, now_s: float = 1.0) -> bool:
    key = router.state(now_s).fallback.providers[name].keys["default"]
    return key.breaker.state is BreakerState.OPEN


def answers_500(router: Router, request_id: str, now_s: float = 0.5, **fields) -> list:
    return router.providers.on_failed(
        request_id, Failure.ERROR, now_s, may_be_requests=True, **fields
    )


def test_it_was_the_providers_where_another_one_answers():
    router = make()
    assert router.on_arrival(req("a"), 0.0) == [Fallback("a", "p0", "default")]
    assert answers_500(router, "a") == [Fallback("a", "p1", "default")]
    assert not is_open(router, "p0")
    router.on_first_token("a", 0.7)
    assert is_open(router, "p0")
    router.on_finish("a", USAGE, 0.8)
    assert not is_open(router, "p1")


def test_it_was_the_requests_where_none_does():
    """However often: nobody else is kept from a provider by it."""
    router = make()
    for number in range(20):
        request_id = f"poison{number}"
        decisions = router.on_arrival(req(request_id), number)
        num_tries = 0
        while isinstance(decisions[0], Fallback):
            num_tries += 1
            decisions = answers_500(router, request_id, number)
        assert decisions == [Fail(request_id)]
        assert num_tries == 4  # two each
        assert not is_open(router, "p0", number)
        assert not is_open(router, "p1", number)
    assert router.on_arrival(req("good"), 21.0) == [Fallback("good", "p0", "default")]
    state = router.state(21.0).fallback.providers["p0"].keys["default"]
    assert state.breaker.num_open_calls == 1


@pytest.mark.parametrize("failure", list(Failure))
def test_what_no_request_can_do_is_a_failure_at_once(failure):
    router = make()
    router.on_arrival(req("a"), 0.0)
    router.providers.on_failed("a", failure, 0.5)
    assert is_open(router, "p0")


def test_an_engine_that_answers_tells_as_well():
    router = make()
    router.on_arrival(req("a"), 0.0)
    assert answers_500(router, "a") == [Fallback("a", "p1", "default")]
    router.on_replica_up("r0", info(), 0.6)
    router.on_snapshot("r0", snapshot(), 0.6)
    [dispatch] = answers_500(router, "a", 0.7)
    assert isinstance(dispatch, Dispatch)
    assert not is_open(router, "p0")
    router.on_first_token("a", 0.8)
    assert is_open(router, "p0")
    assert is_open(router, "p1")


def test_a_provider_that_answers_tells_of_engines():
    router = make(num_replicas=1)
    decisions = router.on_arrival(req("a"), 0.0)
    while isinstance(decisions[0], Dispatch):
        decisions = fail_attempt(router, "a", Failure.ERROR, 0.1)
    assert isinstance(decisions[0], Fallback)
    assert router.state(0.2).replicas["r0"].breaker.state is BreakerState.CLOSED
    router.on_first_token("a", 0.3)
    assert router.state(0.3).replicas["r0"].breaker.state is BreakerState.OPEN


def test_what_had_begun_to_answer_is_judged_when_the_other_has_ended():
    router = make(continues=True)
    router.on_arrival(req("a"), 0.0)
    router.on_first_token("a", 0.2)
    assert answers_500(router, "a", can_retry=False, num_output_tokens=3) == [
        Fallback("a", "p1", "default")
    ]
    router.on_first_token("a", 0.7)
    assert not is_open(router, "p0")
    router.on_finish("a", USAGE, 0.8)
    assert is_open(router, "p0")


def test_a_probe_that_tells_nothing_is_followed_by_another():
    router = make()
    router.on_arrival(req("a"), 0.0)
    router.providers.on_failed("a", Failure.ERROR, 0.0)
    router.on_cancel("a", 0.0)
    assert router.on_arrival(req("probe"), 2.0) == [Fallback("probe", "p0", "default")]
    answers_500(router, "probe", 2.1)
    assert router.on_arrival(req("next"), 2.2) == [Fallback("next", "p0", "default")]
    router.on_first_token("next", 2.3)
    assert not is_open(router, "p0", 2.4)


def test_a_key_that_is_gone_is_blamed_no_more():
    router = make()
    router.on_arrival(req("a"), 0.0)
    answers_500(router, "a")
    kept = [each.settings for each in router._spillover.providers if each.name == "p1"]
    router.providers.use(kept, FallbackSettings(), 0.6)
    router.on_first_token("a", 0.7)
    assert router.on_finish("a", USAGE, 0.8) == []
