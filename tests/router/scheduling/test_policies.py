import random
from collections import Counter

import pytest

from router.fleet.replica import Replica
from router.scheduling.policies import POLICIES, Load, Policy, make_policy
from router.scheduling.policies.least_kv_usage import kv_usage
from router.scheduling.policies.least_response_time import LeastResponseTime
from router.scheduling.prefix_index import PrefixIndex
from router.types import PREFIX_BLOCK_TOKENS
from tests.support.builders import busy, info, make_replica, req, snapshot

NOTHING_HELD = Load(num_held_per_engine=0.0)


def make(name, *ablated: str) -> Policy:
    return make_policy(name, random.Random(0), ablated)


def replicas(number: int) -> list[Replica]:
    return [make_replica(f"r{index}") for index in range(number)]


def load(replica: Replica, *token_counts: int) -> None:
    """Book requests of these sizes on the replica."""
    for num_tokens in token_counts:
        request = req(f"on-{replica.id}-{replica.ledger.num_open}", num_tokens)
        replica.book(request, num_kv_tokens=num_tokens, now_s=0.0)


def prompt(*blocks: int, request_id: str = "a"):
    """A request of these blocks. Chained: a number stands for all blocks up to it."""
    return req(request_id, PREFIX_BLOCK_TOKENS * len(blocks), prefix_hashes=blocks)


def choices(policy, request, given, number: int = 50) -> set[str]:
    return {policy.choose(request, given, NOTHING_HELD, 0.0).id for _ in range(number)}


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_chooses_one_of_those_it_is_given(name):
    policy = make(name)
    given = replicas(3)
    for number in (1, 2, 3):
        for _ in range(10):
            assert policy.choose(req(), given[:number], NOTHING_HELD, 0.0) in given[:number]


@pytest.mark.parametrize("name", POLICIES)
def test_a_seed_reproduces_a_run(name):
    def run() -> list[str]:
        policy, given, chosen = make(name), replicas(4), []
        for number in range(30):
            replica = policy.choose(req(str(number)), given, NOTHING_HELD, float(number))
            replica.book(req(str(number)), num_kv_tokens=10, now_s=float(number))
            chosen.append(replica.id)
        return chosen

    assert run() == run()


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - {"least_response_time"}))
def test_idle_engines_are_all_used(name):
    policy, given = make(name), replicas(4)
    chosen = Counter(policy.choose(req(), given, NOTHING_HELD, 0.0).id for _ in range(200))
    assert len(chosen) == 4


def test_headway_counts_tokens_not_requests():
    policy, (one_document, many_questions) = make("headway"), replicas(2)
    load(one_document, 5000)
    load(many_questions, 20, 20, 20, 20)
    assert policy.choose(req(), [one_document, many_questions], NOTHING_HELD, 0.0) is many_questions
    assert (
        make("least_requests").choose(req(), [one_document, many_questions], NOTHING_HELD, 0.0)
        is one_document
    )


def test_headway_heeds_no_noise_in_what_one_more_sequence_costs():
    """Steps of both take as long; by the slopes alone the crowded one would be cheaper."""
    crowded, quiet = given = replicas(2)
    for replica, num, base_s, decode_s in ((crowded, 12, 0.1, 0.001), (quiet, 10, 0.096, 0.0016)):
        replica.predictor.step_base_s, replica.predictor.decode_s = base_s, decode_s
        replica.receive(busy(num_running_reqs=num, num_decoding_reqs=num), 0.0)
    assert choices(make("headway"), req("a", 50, num_expected_output_tokens=2000), given) == {"r1"}


def test_headway_knows_that_one_more_sequence_costs_more_on_a_slow_engine():
    """Half as fast with a few sequences less; a prompt of 1 token waits as long on both."""
    slow, fast = given = replicas(2)
    for replica, num, factor in ((slow, 10, 2.0), (fast, 12, 1.0)):
        replica.predictor.step_base_s, replica.predictor.decode_s = 1e-4 * factor, 1e-3 * factor
        replica.receive(busy(num_running_reqs=num, num_decoding_reqs=num), 0.0)
    assert choices(make("headway"), req("a", 1, num_expected_output_tokens=4000), given) == {"r1"}


def test_headway_does_not_send_a_burst_to_whoever_decodes_least():
    """What is in prefill will be decoding, too."""
    policy, (few, more) = make("headway"), replicas(2)
    few.receive(busy(num_running_reqs=2, num_decoding_reqs=2), 0.0)
    more.receive(busy(num_running_reqs=6, num_decoding_reqs=6), 0.0)
    chosen = []
    for number in range(8):
        request = req(f"r{number}", 200)
        replica = policy.choose(request, [few, more], NOTHING_HELD, 0.0)
        replica.book(request, 200, 0.0)
        chosen.append(replica.id)
    assert chosen[0] == few.id
    assert chosen.count(more.id) >= 3


def test_headway_spares_long_prompts_that_would_be_passed():
    """It would be answered as soon beside the long one, which would have to wait for it."""
    given = [make_replica(f"r{index}", max_prefill_chunk=50) for index in range(2)]
    for replica, num_tokens in zip(given, (500, 50), strict=True):
        replica.receive(busy(num_running_reqs=7, num_decoding_reqs=7), 0.0)
        replica.book(req(f"on-{replica.id}", num_tokens, edf_key_s=10.0), num_tokens, 0.0)
    asked = req("a", 20, edf_key_s=9.0)
    beside_long_s, beside_short_s = (replica.ttft_s(20, 0.0, 9.0) for replica in given)
    assert beside_long_s <= beside_short_s
    assert choices(make("headway"), asked, given) == {"r1"}


def test_headway_without_congestion_cost_looks_at_its_own_wait_only():
    quiet, crowded = replicas(2)
    quiet.receive(snapshot(prefill_tokens_per_s=400.0), 0.0)
    seven = {"num_running_reqs": 7, "num_decoding_reqs": 7}
    crowded.receive(busy(**seven, prefill_tokens_per_s=450.0), 0.0)
    for policy, chosen in ((make("headway"), quiet), (make("headway", "congestion_cost"), crowded)):
        assert policy.choose(req("a", 50), [quiet, crowded], NOTHING_HELD, 9.0) is chosen


def test_headway_prefers_the_faster_of_two_idle_engines():
    slow, fast = replicas(2)
    slow.receive(snapshot(prefill_tokens_per_s=100.0), 0.0)
    fast.receive(snapshot(prefill_tokens_per_s=1000.0), 0.0)
    assert make("headway").choose(req(), [slow, fast], NOTHING_HELD, 0.0) is fast


def test_headway_reaches_every_one_of_very_many():
    policy, given = make("headway"), replicas(300)
    chosen = {policy.choose(req(), given, NOTHING_HELD, 0.0).id for _ in range(3000)}
    assert len(chosen) == 300


def test_round_robin_keeps_its_turn_while_replicas_come_and_go():
    policy, given = make("round_robin"), replicas(4)
    turn = [policy.choose(req(), given, NOTHING_HELD, 0.0).id for _ in range(5)]
    assert turn == ["r0", "r1", "r2", "r3", "r0"]
    assert policy.choose(req(), given[2:], NOTHING_HELD, 0.0).id == "r2"
    assert policy.choose(req(), given, NOTHING_HELD, 0.0).id == "r3"


def test_power_of_two_never_takes_the_worst_of_three():
    policy, given = make("power_of_two"), replicas(3)
    load(given[1], 1, 1, 1)
    assert all(policy.choose(req(), given, NOTHING_HELD, 0.0) is not given[1] for _ in range(100))


def test_only_headway_wants_a_hold_queue():
    assert [name for name, policy in POLICIES.items() if policy.holds] == ["headway"]


def test_only_policies_that_compare_prompts_want_their_hashes():
    assert {name for name, policy in POLICIES.items() if policy.wants_prefix} == {
        "cache_aware",
        "lmetric",
        "weighted_score",
    }


class TestLeastKvUsage:
    def test_counts_what_is_booked_and_relates_it_to_the_size(self):
        small, large = make_replica("small", num_kv_tokens=1000), make_replica("large")
        load(small, 200)
        load(large, 1000)
        assert (kv_usage(small), kv_usage(large)) == (pytest.approx(0.2), pytest.approx(0.1))
        assert make("least_kv_usage").choose(req(), [small, large], NOTHING_HELD, 0.0) is large

    def test_more_than_full_is_still_told_apart(self):
        over, further = replicas(2)
        load(over, 11_000)
        load(further, 12_000)
        assert make("least_kv_usage").choose(req(), [further, over], NOTHING_HELD, 0.0) is over

    def test_ties_by_fewest_requests_then_at_random(self):
        one, *two = replicas(3)
        load(one, 50, 50)
        for replica in two:
            load(replica, 100)
        assert choices(make("least_kv_usage"), req(), [one, *two]) == {"r1", "r2"}


class TestCacheAware:
    def test_goes_where_the_longest_prefix_went(self):
        policy, given = make("cache_aware"), replicas(3)
        policy.choose(prompt(1, 2), given[1:2], NOTHING_HELD, 0.0)
        policy.choose(prompt(1, 2, 3), given[2:], NOTHING_HELD, 0.0)
        load(given[2], 10, 10)
        assert choices(policy, prompt(1, 2, 3, 4), given) == {"r2"}

    def test_the_least_loaded_of_equal_matches(self):
        policy, given = make("cache_aware"), replicas(3)
        for replica in given[1:]:
            policy.choose(prompt(1, 2), [replica], NOTHING_HELD, 0.0)
        load(given[1], 10)
        assert policy.choose(prompt(1, 2), given, NOTHING_HELD, 0.0) is given[2]

    @pytest.mark.parametrize(("num_shared", "follows"), [(3, False), (4, True)])
    def test_a_match_of_thirty_percent_is_none(self, num_shared, follows):
        policy, (first, idle) = make("cache_aware"), replicas(2)
        policy.choose(prompt(*range(num_shared)), [first], NOTHING_HELD, 0.0)
        load(first, 10)
        assert (
            policy.choose(prompt(*range(10)), [first, idle], NOTHING_HELD, 0.0) is first
        ) == follows

    @pytest.mark.parametrize(
        ("loads", "follows"),
        [
            ((64, 0), True),  # not more than 64 apart
            ((65, 0), False),
            ((195, 130), True),  # not more than 1.5 times
            ((196, 130), False),
        ],
    )
    def test_uneven_loads_come_first(self, loads, follows):
        policy, given = make("cache_aware"), replicas(2)
        policy.choose(prompt(1, 2), given[:1], NOTHING_HELD, 0.0)
        for replica, number in zip(given, loads, strict=True):
            load(replica, *[1] * number)
        assert (policy.choose(prompt(1, 2), given, NOTHING_HELD, 0.0) is given[0]) == follows

    def test_learns_while_loads_are_uneven(self):
        policy, given = make("cache_aware"), replicas(2)
        load(given[0], *[1] * 100)
        policy.choose(prompt(1, 2), given, NOTHING_HELD, 0.0)
        load(given[1], *[1] * 110)
        assert policy.choose(prompt(1, 2), given, NOTHING_HELD, 0.0) is given[1]


class TestWeightedScore:
    """Weights 2, 2 and 3 for queue, KV cache and prefix."""

    def test_a_shorter_queue_weighs_two(self):
        policy, given = make("weighted_score"), replicas(2)
        given[0].receive(busy(num_waiting_reqs=1), 0.0)
        assert choices(policy, prompt(1, 2), given, 1) == {"r1"}
        policy.choose(prompt(7, 8, 9), given[:1], NOTHING_HELD, 0.0)
        assert policy.choose(prompt(7, 8), given, NOTHING_HELD, 0.0) is given[0]  # 3 for the prefix
        assert (
            policy.choose(prompt(7, 5), given, NOTHING_HELD, 0.0) is given[1]
        )  # 1.5 for half of it

    def test_free_kv_cache_weighs_two(self):
        policy, given = make("weighted_score"), replicas(2)
        given[0].receive(busy(num_free_kv_tokens=4000), 0.0)
        assert policy.choose(prompt(1), given, NOTHING_HELD, 0.0) is given[1]
        policy.choose(prompt(7, 8), given[:1], NOTHING_HELD, 0.0)
        assert (
            policy.choose(prompt(7, 5), given, NOTHING_HELD, 0.0) is given[0]
        )  # 1.5 against 2 x 0.6

    def test_counts_what_is_on_its_way(self):
        policy, given = make("weighted_score"), replicas(2)
        load(given[0], 1)
        assert choices(policy, req(), given) == {"r1"}

    def test_equals_at_random(self):
        assert len(choices(make("weighted_score"), req(), replicas(4))) == 4


class TestLMetric:
    """(Pending + new tokens) x (sequences + 1)."""

    def test_pending_tokens_and_sequences_multiply(self):
        policy, given = make("lmetric"), replicas(2)
        given[0].receive(busy(num_pending_prefill_tokens=900), 0.0)  # 1,000 x 2
        given[1].receive(busy(num_running_reqs=18), 0.0)  # 100 x 19
        request = req(num_tokens=100)
        assert policy.choose(request, given, NOTHING_HELD, 0.0) is given[1]
        given[1].receive(busy(seq=2, num_running_reqs=20), 0.0)  # 100 x 21
        assert policy.choose(request, given, NOTHING_HELD, 0.0) is given[0]

    def test_equals_at_random(self):
        assert len(choices(make("lmetric"), req(), replicas(4))) == 4


class TestVllmDp:
    """max(in flight, waiting + running) + 6 waiting max(0, kv - 0.5), published every 0.1 s."""

    def test_counts_what_waits_only_where_the_cache_is_full(self):
        policy, given = make("vllm_dp"), replicas(2)
        given[0].receive(busy(num_running_reqs=0, num_waiting_reqs=4, kv_cache_usage=0.5), 0.0)
        given[1].receive(busy(num_running_reqs=4, num_waiting_reqs=1, kv_cache_usage=1.0), 0.0)
        assert policy.score(given[0], 0.0) == 4.0
        assert policy.score(given[1], 0.0) == 5.0 + 3.0

    def test_knows_at_once_what_it_has_sent(self):
        policy, (replica,) = make("vllm_dp"), replicas(1)
        assert policy.score(replica, 0.0) == 0.0
        load(replica, 1, 1)
        assert policy.score(replica, 0.05) == 2.0

    def test_what_engines_count_is_up_to_a_report_old(self):
        policy, (replica,) = make("vllm_dp"), replicas(1)
        assert policy.score(replica, 0.01) == 0.0
        replica.receive(busy(num_running_reqs=9), 0.02)
        assert policy.score(replica, 0.099) == 0.0
        assert policy.score(replica, 0.101) == 9.0


class TestPrefixIndex:
    def test_what_matches_is_a_prefix(self):
        index, (replica, other) = PrefixIndex(), replicas(2)
        index.add(prompt(1, 2, 3, 4), replica)
        assert index.match_share(prompt(1, 2, 8, 9), replica) == 0.5
        assert index.match_share(prompt(6, 7, 8, 9), replica) == 0.0
        assert index.match_share(prompt(1, 2, 3, 4), other) == 0.0

    def test_less_than_a_block_matches_nothing(self):
        index, (replica,) = PrefixIndex(), replicas(1)
        index.add(prompt(), replica)
        assert index.match_share(prompt(), replica) == 0.0
        assert index.num_blocks(replica) == 0

    def test_holds_as_many_as_the_engine_could(self):
        """The least recently sent go first, and of one prompt the last blocks."""
        index, replica = PrefixIndex(), make_replica(num_kv_tokens=4 * PREFIX_BLOCK_TOKENS)
        index.add(prompt(1, 2), replica)
        index.add(prompt(5, 6), replica)
        index.add(prompt(1, 2), replica)
        index.add(prompt(9), replica)
        assert index.match_share(prompt(5, 6), replica) == 0.5
        assert index.match_share(prompt(1, 2), replica) == 1.0
        index.add(prompt(*range(10, 30)), replica)
        assert index.num_blocks(replica) == 4
        assert index.match_share(prompt(*range(10, 30)), replica) == 4 / 20

    def test_stays_bounded_whatever_comes(self):
        index, replica = PrefixIndex(), make_replica(num_kv_tokens=50 * PREFIX_BLOCK_TOKENS)
        rng = random.Random(0)
        for _ in range(500):
            start = rng.randrange(20) * 100
            request = prompt(*range(start, start + rng.randrange(100)))
            index.add(request, replica)
            known = [block in index._blocks[replica.life] for block in request.prefix_hashes]
            assert known == sorted(known, reverse=True)  # a prefix
            assert index.num_blocks(replica) <= 50

    def test_a_lost_replica_is_forgotten(self):
        index, given = PrefixIndex(), replicas(2)
        for replica in given:
            index.add(prompt(1), replica)
        del replica, given[0]
        assert len(index._blocks) == 1


class TestLeastResponseTime:
    def test_a_peak_counts_at_once_and_fades(self):
        policy, (slow, fast) = LeastResponseTime(random.Random(0)), replicas(2)
        policy.observe(slow, 1.0, now_s=0.0)
        policy.observe(fast, 0.5, now_s=0.0)
        policy.observe(fast, 2.0, now_s=0.1)
        assert policy.cost_s(fast, 0.1) == pytest.approx(2.0)
        assert policy.choose(req(), [fast, slow], NOTHING_HELD, 0.1) is slow
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
