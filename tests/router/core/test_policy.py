"""What a router does by its policy, and without some of its parts."""

import random

import pytest

from router.core.router import Router
from router.core.settings import RouterSettings
from router.types import Dispatch
from tests.router.core.short_ways import FULL, occupy
from tests.support.builders import busy, info, make_router, req, snapshot, stepped


class TestPolicies:
    @pytest.mark.parametrize("name", ["round_robin", "least_requests", "power_of_two"])
    def test_baselines_send_at_once_whatever_the_load(self, name):
        router = make_router(2, policy=name)
        for number in range(50):
            [decision] = router.on_arrival(req(str(number), FULL), 0.0)
            assert isinstance(decision, Dispatch)

    def test_holding_is_settable_for_any_policy(self):
        assert make_router(policy="round_robin", hold=True).state(0.0).holds
        assert not make_router(policy="headway", hold=False).state(0.0).holds

    def test_a_policy_that_does_not_hold_lets_all_go(self):
        router = make_router()
        occupy(router, "r0")
        router.on_arrival(req("b"), 0.0)
        assert router.set_policy("round_robin", 1.0) == [Dispatch("b", "r0", 2)]
        assert router.state(1.0).policy == "round_robin"

    def test_an_unknown_policy_is_refused_and_changes_nothing(self):
        router = make_router()
        with pytest.raises(ValueError, match=r"'best'.*round_robin"):
            router.set_policy("best", 0.0)
        assert router.state(0.0).policy == "headway"

    def test_without_the_hold_all_go_at_once(self):
        router = make_router(ablate=["hold"])
        for number in range(50):
            [decision] = router.on_arrival(req(str(number), FULL), 0.0)
            assert isinstance(decision, Dispatch)

    @pytest.mark.parametrize(
        ("ablate", "first"), [((), "question"), (("order",), "document")], ids=["with", "without"]
    )
    def test_without_the_order_first_come_is_first_served(self, ablate, first):
        router = make_router(ablate=ablate)
        occupy(router, "r0")
        router.on_arrival(req("document", 4000, arrival_s=0.0), 0.0)
        router.on_arrival(req("question", 10, arrival_s=0.1), 0.1)
        freed = router.on_snapshot("r0", busy(last_booking=1), 1.0)
        assert freed[0].request_id == first

    def test_engines_that_have_run_nothing_are_used_beside_fast_ones(self):
        """What the one engine that has worked has learned holds for its like."""
        router = make_router(8)
        for number in range(1, 33):
            router.on_snapshot("r0", stepped(number, 0.002, prefill=100, decodes=1), 0.01 * number)
        for number in range(16):
            router.on_arrival(req(str(number), 100), 1.0)
        used = {name for name, each in router.state(1.0).replicas.items() if each.ledger.num_open}
        assert len(used) == 8

    def test_without_congestion_cost_those_who_decode_do_not_count(self):
        def chosen(**settings) -> str:
            router = make_router(2, **settings)
            router.on_snapshot("r0", snapshot(prefill_tokens_per_s=400.0), 0.0)
            crowded = busy(num_running_reqs=7, num_decoding_reqs=7, prefill_tokens_per_s=450.0)
            router.on_snapshot("r1", crowded, 0.0)
            [dispatch] = router.on_arrival(req("a", 50), 9.0)
            return dispatch.replica_id

        assert chosen() == "r0"
        assert chosen(ablate=["congestion_cost"]) == "r1"

    def test_parts_can_be_switched_while_requests_are_held(self):
        router = make_router()
        occupy(router, "r0")
        router.on_arrival(req("document", 4000, arrival_s=0.0), 0.0)
        router.on_arrival(req("question", 10, arrival_s=0.1), 0.1)
        assert router.set_policy("headway", 0.2, ["order"]) == []
        assert router.state(0.2).ablate == ["order"]
        both = router.set_policy("headway", 0.3, ["order", "hold"])
        assert both == [Dispatch("document", "r0", 2), Dispatch("question", "r0", 3)]
        router.set_policy("headway", 0.4)
        assert router.state(0.4).ablate == []
        assert router.state(0.4).holds

    def test_an_unknown_part_is_refused_and_changes_nothing(self):
        router = make_router(ablate=["order"])
        with pytest.raises(ValueError, match=r"'magic'.*congestion_cost"):
            router.set_policy("round_robin", 0.0, ["magic"])
        state = router.state(0.0)
        assert (state.policy, state.ablate) == ("headway", ["order"])
        with pytest.raises(ValueError, match="ablate"):
            make_router(ablate=["magic"])

    def test_says_whether_prefix_hashes_are_wanted(self):
        router = make_router()
        assert router.discipline.wants_prefix
        router.set_policy("headway", 0.0, ["prefix"])
        assert not router.discipline.wants_prefix
        router.set_policy("cache_aware", 0.0)
        assert router.discipline.wants_prefix

    def test_latencies_reach_the_policy(self):
        """By first token, or by the end where the response comes in one piece."""
        router = make_router(2, policy="least_response_time")
        router.on_arrival(req("a"), 0.0)
        router.on_first_token("a", 5.0)
        router.on_finish("a", None, 5.0)
        [other] = router.on_arrival(req("b"), 5.0)
        assert other.replica_id == "r1"
        router.on_finish("b", None, 15.0)
        [back] = router.on_arrival(req("c"), 15.0)
        assert back.replica_id == "r0"

    def test_an_injected_generator_decides(self):
        def run(rng: random.Random) -> list[str]:
            router = Router(RouterSettings(policy="power_of_two"), rng)
            for index in range(4):
                router.on_replica_up(f"r{index}", info(), 0.0)
            return [router.on_arrival(req(str(n)), 0.0)[0].replica_id for n in range(20)]

        assert run(random.Random(1)) == run(random.Random(1)) != run(random.Random(2))


def test_prediction_accuracy_is_that_of_the_present_policy():
    router = make_router()
    router.on_arrival(req("a"), 0.0)
    router.on_first_token("a", 1.0)
    assert router.state(1.0).accuracy.ttft.num_compared == 1
    router.set_policy("round_robin", 1.0)
    assert router.state(1.0).accuracy.ttft.num_compared == 0


def compare(router: Router, name: str, actual_over_predicted: float) -> None:
    """Have 50 predictions of the first token compared with what came."""
    for number in range(50):
        request_id = f"{name}{number}"
        router.on_arrival(req(request_id, 1000), 0.0)
        predicted_s = router._attempts.oldest(request_id).predicted_ttft_s
        router.on_first_token(request_id, predicted_s * actual_over_predicted)
        router.on_finish(request_id, None, 1.0)


def test_bad_predictions_give_way_to_the_order_of_arrival():
    router = make_router()
    compare(router, "bad", 0.25)  # predicted four times too long
    assert router.state(1.0).is_by_arrival
    occupy(router, "r0")
    router.on_arrival(req("document", 4000, arrival_s=0.0), 0.0)
    router.on_arrival(req("question", 10, arrival_s=0.1), 0.1)
    freed = router.on_finish("full-r0", None, 1.0)
    assert freed[0].request_id == "document"
    for request_id in ("document", "question"):
        router.on_cancel(request_id, 1.0)
    for repeat in range(3):
        compare(router, f"good{repeat}-", 1.0)
    assert not router.state(1.0).is_by_arrival
