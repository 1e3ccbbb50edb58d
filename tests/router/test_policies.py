import random
from collections import Counter

import pytest
from router_builders import busy, info, make_replica, req, snapshot

from router.policies import POLICIES
from router.policies.headway import cost_s
from router.policies.least_response_time import LeastResponseTime
from router.replica import Replica


def make(name):
    return POLICIES[name](random.Random(0))


def replicas(number: int) -> list[Replica]:
    return [make_replica(f"r{index}") for index in range(number)]


def load(replica: Replica, *token_counts: int) -> None:
    """Book requests of these sizes on the replica."""
    for num_tokens in token_counts:
        request = req(f"on-{replica.id}-{replica.ledger.num_open}", num_tokens)
        replica.book(request, num_kv_tokens=num_tokens, now_s=0.0)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_chooses_one_of_those_it_is_given(name):
    policy = make(name)
    given = replicas(3)
    for number in (1, 2, 3):
        for _ in range(10):
            assert policy.choose(req(), given[:number], 0.0) in given[:number]


@pytest.mark.parametrize("name", POLICIES)
def test_a_seed_reproduces_a_run(name):
    def run() -> list[str]:
        policy, given, chosen = make(name), replicas(4), []
        for number in range(30):
            replica = policy.choose(req(str(number)), given, float(number))
            replica.book(req(str(number)), num_kv_tokens=10, now_s=float(number))
            chosen.append(replica.id)
        return chosen

    assert run() == run()


@pytest.mark.parametrize("name", ["headway", "least_requests", "round_robin", "power_of_two"])
def test_idle_engines_are_all_used(name):
    policy, given = make(name), replicas(4)
    chosen = Counter(policy.choose(req(), given, 0.0).id for _ in range(200))
    assert len(chosen) == 4


def test_headway_counts_tokens_not_requests():
    policy, (one_document, many_questions) = make("headway"), replicas(2)
    load(one_document, 5000)
    load(many_questions, 20, 20, 20, 20)
    assert policy.choose(req(), [one_document, many_questions], 0.0) is many_questions
    assert make("least_requests").choose(req(), [one_document, many_questions], 0.0) is one_document


def test_headway_spares_those_who_decode():
    quiet, crowded = replicas(2)
    quiet.receive(busy(num_decoding_reqs=1), 0.0)
    crowded.receive(busy(num_decoding_reqs=7), 0.0)
    delay_s = 50 * quiet.token_s
    assert cost_s(req("a", 50), quiet, 0.0) == pytest.approx(quiet.ttft_s(50, 0.0) + delay_s)
    assert make("headway").choose(req("a", 50), [crowded, quiet], 0.0) is quiet


def test_headway_prefers_the_faster_of_two_idle_engines():
    slow, fast = replicas(2)
    slow.receive(snapshot(prefill_tokens_per_s=100.0), 0.0)
    fast.receive(snapshot(prefill_tokens_per_s=1000.0), 0.0)
    assert make("headway").choose(req(), [slow, fast], 0.0) is fast


def test_headway_reaches_every_one_of_very_many():
    policy, given = make("headway"), replicas(300)
    chosen = {policy.choose(req(), given, 0.0).id for _ in range(3000)}
    assert len(chosen) == 300


def test_round_robin_keeps_its_turn_while_replicas_come_and_go():
    policy, given = make("round_robin"), replicas(4)
    turn = [policy.choose(req(), given, 0.0).id for _ in range(5)]
    assert turn == ["r0", "r1", "r2", "r3", "r0"]
    assert policy.choose(req(), given[2:], 0.0).id == "r2"
    assert policy.choose(req(), given, 0.0).id == "r3"


def test_power_of_two_never_takes_the_worst_of_three():
    policy, given = make("power_of_two"), replicas(3)
    load(given[1], 1, 1, 1)
    assert all(policy.choose(req(), given, 0.0) is not given[1] for _ in range(100))


def test_only_headway_wants_a_hold_queue():
    assert [name for name, policy in POLICIES.items() if policy.holds] == ["headway"]


class TestLeastResponseTime:
    def test_a_peak_counts_at_once_and_fades(self):
        policy, (slow, fast) = LeastResponseTime(random.Random(0)), replicas(2)
        policy.observe(slow, 1.0, now_s=0.0)
        policy.observe(fast, 0.5, now_s=0.0)
        policy.observe(fast, 2.0, now_s=0.1)
        assert policy.cost_s(fast, 0.1) == pytest.approx(2.0)
        assert policy.choose(req(), [fast, slow], 0.1) is slow
        assert policy.cost_s(fast, 10.1) == pytest.approx(2.0 / 2.71828, rel=1e-3)

    def test_a_lower_latency_is_mixed_in_by_age(self):
        policy, (replica,) = LeastResponseTime(random.Random(0)), replicas(1)
        policy.observe(replica, 1.0, now_s=0.0)
        policy.observe(replica, 0.0, now_s=10.0)
        assert policy.cost_s(replica, 10.0) == pytest.approx(0.3679, rel=1e-3)

    def test_outstanding_requests_multiply(self):
        policy, (replica,) = LeastResponseTime(random.Random(0)), replicas(1)
        idle_s = policy.cost_s(replica, 0.0)
        load(replica, 1, 1)
        assert policy.cost_s(replica, 0.0) == pytest.approx(3 * idle_s)

    def test_a_new_replica_of_the_same_name_starts_afresh(self):
        policy = LeastResponseTime(random.Random(0))
        old, new = Replica("r0", info(), 0.0), Replica("r0", info(), 0.0)
        policy.observe(old, 9.0, now_s=0.0)
        assert policy.cost_s(new, 0.0) < 1.0
