"""When requests go to providers, and to which."""

import pytest

from router.core.router import Router
from router.limits.rate_limit import RateReport
from router.providers.settings import FallbackSettings, ProviderSettings
from router.resilience.breaker import BreakerState, Failure
from router.types import (
    Dispatch,
    Fail,
    Fallback,
    Hold,
    Outcome,
    Reject,
    RejectReason,
    Usage,
)
from tests.support.builders import busy, fail_attempt, info, make_router, req

TRAFFIC = RateReport()


def provider(name: str = "p0", **fields) -> ProviderSettings:
    """A free provider of model `m` without limits, whose first token takes 0.1 s."""
    return ProviderSettings.model_validate(
        {"name": name, "models": {"m": "their-m"}, "ttft_s": 0.1} | fields
    )


def limited(name: str = "p0", **limits) -> ProviderSettings:
    """The same, under these limits."""
    return provider(name, keys=[limits])


def make(*providers: ProviderSettings, num_replicas: int = 0, spill: str = "late", **settings):
    """A router with these providers, and engines that are idle."""
    router = make_router(num_replicas, **settings)
    router.providers.use(providers, FallbackSettings(spill=spill), 0.0)
    return router


def overload(router: Router, num_requests: int = 40) -> list:
    """Decisions for so many prompts of 900 tokens at once, against one engine."""
    decisions = []
    for number in range(num_requests):
        decisions += router.on_arrival(req(f"load{number}", 900), now_s=0.0)
    return decisions


def fallbacks(decisions: list) -> list[str]:
    return [decision.request_id for decision in decisions if isinstance(decision, Fallback)]


def test_without_an_engine_the_first_provider_answers():
    router = make(provider("p0"), provider("p1"))
    assert router.on_arrival(req("a"), 0.0) == [Fallback("a", "p0", "default")]
    assert router.on_finish("a", Usage(num_prompt_tokens=10, num_output_tokens=5), 1.0) == []
    assert router.outcomes[Outcome.COMPLETED] == 1


def test_an_idle_engine_comes_before_any_provider():
    router = make(provider(), num_replicas=1)
    [decision] = router.on_arrival(req("a"), 0.0)
    assert isinstance(decision, Dispatch)


def test_who_would_wait_past_its_promise_goes_and_nobody_else():
    router = make(provider(), num_replicas=1)
    decisions = overload(router)
    assert not fallbacks(decisions)  # looked at 50 ms apart
    gone = fallbacks(router.on_tick(0.06))
    held = router.state(0.06).held.num_requests
    assert gone
    # The engine prefills 900 tokens in about 0.4 s (its cold start's guess) and 2.3 s are
    # the target: a handful meets it here.
    assert 3 <= held <= 8
    assert held + len(gone) + router.state(0.06).num_placed == 40


def crowd(*providers: ProviderSettings) -> list[str]:
    """Who goes of a document and twenty questions, if 2 s are the target of all.

    They are 5,000 tokens; the engine prefills about 2,200 a second (its cold start's guess).
    """
    router = make(*providers, num_replicas=1, ttft_target_base_s=2.0, ttft_target_s_per_token=0.0)
    router.on_snapshot("r0", busy(1, num_pending_prefill_tokens=300), 0.0)
    decisions = router.on_arrival(req("document", 3000), 0.0)
    for number in range(20):
        decisions += router.on_arrival(req(f"question{number}", 100), 0.0)
    return fallbacks([*decisions, *router.on_tick(0.06)])


def test_who_costs_least_for_the_room_it_makes_leaves():
    """Not those that would be late: twelve would have to go, and each cost its answer, too."""
    assert crowd(provider(price_prompt=1.0, price_output=10.0)) == ["document"]


def test_who_is_too_dear_stays_and_others_leave_for_it():
    dear = provider(price_prompt=1e6, max_cost_per_request=1000.0)
    gone = crowd(dear)
    assert len(gone) > 5
    assert "document" not in gone


def test_nobody_in_time_leaves_who_might_be_late_there():
    """However cheap. Who would be late here goes itself: it may be sooner there."""
    gone = crowd(provider(price_prompt=1.0, ttft_s=1.9))
    assert "document" not in gone
    assert gone == sorted(gone, key=lambda name: int(name.removeprefix("question")))


def test_a_providers_first_tokens_are_learned_from_the_first_on():
    router = make(provider(ttft_s=5.0))
    for number, ttft_s in enumerate((0.2, 0.4, 0.3)):
        router.on_arrival(req(f"q{number}"), 10.0 * number)
        router.on_first_token(f"q{number}", 10.0 * number + ttft_s)
    learned = router.state(30.0).fallback.providers["p0"].ttft_s
    assert learned == pytest.approx(0.3)


@pytest.mark.parametrize("spill", ["full", "unavailable"])
def test_late_is_no_reason_where_it_is_not_asked_for(spill):
    router = make(provider(), num_replicas=1, spill=spill)
    overload(router)
    assert fallbacks(router.on_tick(0.06)) == []


def test_a_full_queue_overflows_to_the_provider():
    for spill, kind in (("full", Fallback), ("unavailable", Reject)):
        router = make(provider(), num_replicas=1, spill=spill, max_held_requests=1)
        assert isinstance(overload(router, 10)[-1], kind)


def test_a_provider_that_is_not_faster_gets_nothing():
    router = make(provider(ttft_s=600.0), num_replicas=1)
    overload(router)
    assert fallbacks(router.on_tick(0.06)) == []


def test_a_request_that_costs_too_much_stays():
    dear = {"price_prompt": 1e6, "max_cost_per_request": 500.0}
    router = make(provider(**dear), num_replicas=1)
    overload(router)
    assert fallbacks(router.on_tick(0.06)) == []
    router = make(provider(**dear))
    assert router.on_arrival(req("big", 900), 0.0) == [Reject("big", RejectReason.NO_BUDGET, None)]
    assert router.on_arrival(req("small", 10), 0.0) == [Fallback("small", "p0", "default")]


def test_the_cost_of_an_hour_is_a_limit():
    router = make(provider(price_prompt=1e6, keys=[{"max_cost_per_hour": 100.0}]))
    assert fallbacks(router.on_arrival(req("a", 80), 0.0)) == ["a"]
    [decision] = router.on_arrival(req("b", 80), 1.0)
    assert decision.reason is RejectReason.NO_BUDGET
    assert decision.retry_after_s > 3500


def test_a_request_waits_for_the_budget_that_returns_before_its_deadline():
    """60 a minute: from half of them on spaced up to a second apart, and 3 s are the target."""
    router = make(limited("p0", rpm=60), provider("p1"), ttft_target_base_s=3.0)
    for number in range(50):
        assert fallbacks(router.on_arrival(req(f"q{number}"), number * 1.0))
    assert router.on_arrival(req("a", arrival_s=49.1), 49.1) == [Hold("a")]
    decisions, now_s = [], 49.1
    while not decisions:
        now_s = router.next_wake_s()
        decisions = router.on_tick(now_s)
    assert decisions == [Fallback("a", "p0", "default")]
    assert 49.5 < now_s < 50.2


def test_where_the_budget_returns_too_late_the_next_provider_answers():
    router = make(limited("p0", rpm=1), limited("p1", rpm=1), provider("p2"))
    chosen = [router.on_arrival(req(f"q{number}"), 0.0)[0].provider for number in range(4)]
    assert chosen == ["p0", "p1", "p2", "p2"]


def test_a_second_key_is_used_before_a_second_provider():
    keys = [{"name": "x", "rpm": 1}, {"name": "y", "rpm": 1}]
    router = make(provider("p0", keys=keys), provider("p1"))
    chosen = [router.on_arrival(req(f"q{number}"), 0.0)[0] for number in range(3)]
    assert [(decision.provider, decision.key) for decision in chosen] == [
        ("p0", "x"),
        ("p0", "y"),
        ("p1", "default"),
    ]


def test_who_waits_for_a_budget_goes_to_an_engine_that_comes_first():
    router = make(limited(rpm=1), ttft_target_base_s=100.0)
    router.on_arrival(req("a"), 0.0)
    assert router.on_arrival(req("b"), 0.0) == [Hold("b")]
    [decision] = router.on_replica_up("r0", info(), 1.0)
    assert isinstance(decision, Dispatch)


def test_a_refused_request_waits_or_moves_on():
    router = make(provider("p0"), provider("p1"))
    router.on_arrival(req("a"), 0.0)
    assert router.providers.on_refused("a", RateReport(retry_after_s=20.0), 0.1) == [
        Fallback("a", "p1", "default")
    ]
    assert router.on_arrival(req("b"), 1.0) == [Fallback("b", "p1", "default")]
    assert router.on_arrival(req("c"), 20.2) == [Fallback("c", "p0", "default")]


def test_a_failure_before_the_first_token_moves_on_and_the_probe_brings_traffic_back():
    router = make(provider("p0"), provider("p1"))
    now_s = 0.0
    for number in range(4):
        request_id = f"q{number}"
        decisions = router.on_arrival(req(request_id), now_s)
        if decisions[0].provider == "p0":
            decisions = router.providers.on_failed(request_id, Failure.ERROR, now_s, was_sent=False)
        assert decisions[0].provider == "p1"
        now_s += 0.01
    state = router.state(now_s).fallback.providers["p0"].keys["default"]
    assert state.breaker.state is BreakerState.OPEN
    assert state.budget.requests.used == 0
    # After the cooldown exactly one request probes; its first token brings the rest back.
    now_s = 2.0
    assert router.on_arrival(req("probe"), now_s)[0].provider == "p0"
    assert router.on_arrival(req("other"), now_s)[0].provider == "p1"
    router.on_first_token("probe", now_s + 0.1)
    assert router.on_arrival(req("next"), now_s + 0.2)[0].provider == "p0"


def test_a_request_that_fails_everywhere_is_given_up():
    router = make(provider("p0"), provider("p1"))
    decisions = router.on_arrival(req("a"), 0.0)
    now_s = 0.0
    for _ in range(20):
        if not isinstance(decisions[-1], Fallback):
            break
        now_s += 10.0
        decisions = router.providers.on_failed("a", Failure.ERROR, now_s)
    assert decisions == [Fail("a")]
    assert router.outcomes == {Outcome.FAILED: 1}


def test_once_an_answer_has_begun_it_is_not_begun_elsewhere():
    router = make(provider("p0"), provider("p1"))
    router.on_arrival(req("a"), 0.0)
    router.on_first_token("a", 0.2)
    assert router.providers.on_failed("a", Failure.ERROR, 0.5, can_retry=False) == [Fail("a")]
    assert router.outcomes[Outcome.FAILED] == 1


def test_a_client_that_leaves_leaves_no_reservation():
    router = make(limited(rpm=5, max_concurrency=1))
    router.on_arrival(req("a"), 0.0)
    router.on_cancel("a", 0.5)
    state = router.state(0.5).fallback
    assert state.num_open == 0
    budget = state.providers["p0"].keys["default"].budget
    assert budget.num_open == 0
    assert budget.requests.used == 1  # it was sent, so the provider may have counted it
    assert router.outcomes[Outcome.RENEGED] == 1


def test_models_that_only_a_provider_has_are_known():
    router = make(provider(models={"big": "x"}), num_replicas=1)
    assert router.on_arrival(req("a", model="big"), 0.0) == [Fallback("a", "p0", "default")]
    [decision] = router.on_arrival(req("b", model="nobody's"), 0.0)
    assert decision.reason is RejectReason.UNKNOWN_MODEL


def test_providers_can_change_while_requests_are_open():
    router = make(limited("p0", rpm=2), provider("p1"))
    router.on_arrival(req("a"), 0.0)
    router.providers.use([limited("p0", rpm=1)], FallbackSettings(), 1.0)
    assert router.on_arrival(req("b"), 1.0)[0] == Hold("b")  # `a` still counts
    assert router.providers.use([limited("p0", rpm=3)], FallbackSettings(), 2.0) == [
        Fallback("b", "p0", "default")
    ]
    router.providers.use([], FallbackSettings(), 3.0)
    assert router.on_finish("a", None, 4.0) == []
    assert router.on_finish("b", None, 4.0) == []
    assert router.outcomes[Outcome.COMPLETED] == 2


def test_a_hung_fleet_is_left_by_the_clock_alone():
    """No event comes from an engine that hangs; what waits for it is looked at all the same."""
    router = make(provider(), num_replicas=1)
    router.on_snapshot("r0", busy(1, num_pending_prefill_tokens=300), 0.0)
    assert router.on_arrival(req("a"), 0.0) == [Hold("a")]
    now_s = 0.0
    while not fallbacks(router.on_tick(now_s)):
        now_s = router.next_wake_s()
        assert now_s < 0.55  # its target is 0.52 s
    assert now_s > 0.2


def test_past_the_last_retry_a_provider_answers():
    router = make(provider(), num_replicas=1, max_attempts=1)
    router.on_arrival(req("a"), 0.0)
    assert fail_attempt(router, "a", Failure.ERROR, 0.1) == [Fallback("a", "p0", "default")]
    router.on_finish("a", None, 1.0)
    assert router.outcomes == {Outcome.COMPLETED: 1}


def test_a_reply_that_an_engine_has_begun_is_for_engines_alone():
    router = make(provider(), num_replicas=1, max_attempts=1)
    router.on_arrival(req("a"), 0.0)
    assert fail_attempt(router, "a", Failure.ERROR, 0.1, has_begun=True) == [Fail("a")]
    router = make(provider(), num_replicas=1)
    router.on_arrival(req("a"), 0.0)
    router.on_replica_down("r0", 0.1)
    assert fail_attempt(router, "a", None, 0.1, has_begun=True) == [Hold("a")]
    assert fallbacks(router.on_tick(5.0)) == []


@pytest.mark.parametrize(("returns", "counted"), [(False, 12 + 50), (True, 12 + 5)])
def test_unused_output_returns_where_the_provider_returns_it(returns, counted):
    router = make(limited(returns_unused_tokens=returns))
    router.on_arrival(req("a", 10, max_output_tokens=50), 0.0)
    router.providers.on_answer("a", TRAFFIC, 0.1)
    router.on_finish("a", Usage(num_prompt_tokens=12, num_output_tokens=5), 1.0)
    budget = router.state(1.0).fallback.providers["p0"].keys["default"].budget
    assert budget.tokens.used == counted
