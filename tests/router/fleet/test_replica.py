import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.fleet.health import was_step_slow
from router.fleet.ledger import peak_growth_tokens
from router.fleet.replica import Replica
from router.resilience.settings import BreakerSettings
from tests.support.builders import busy, make_replica, req, snapshot, stepped


def known(replica: Replica, *, base_s: float = 0.1, token_s: float = 0.01) -> Replica:
    """The replica with its step model known: 0.1 s, and 0.01 s per token."""
    model = replica.predictor
    model.step_base_s, model.token_s, model.decode_s = base_s, token_s, 0.0
    return replica


def test_old_and_repeated_snapshots_change_nothing():
    replica = make_replica()
    assert replica.receive(snapshot(2, num_pending_prefill_tokens=7), 1.0)
    assert not replica.receive(snapshot(2, num_pending_prefill_tokens=8), 2.0)
    assert not replica.receive(snapshot(1, num_pending_prefill_tokens=9), 3.0)
    assert replica.num_pending_prefill_tokens == 7
    assert replica.snapshot_s == 1.0


def test_a_booking_is_counted_by_the_ledger_or_by_the_snapshot_never_by_both():
    replica = make_replica()
    replica.book(req("a", 50), num_kv_tokens=60, now_s=0.0)
    assert (replica.num_pending_prefill_tokens, replica.num_sequences) == (50, 1)
    assert replica.num_free_kv_tokens == 10_000 - 60

    # Read by the engine and not begun: pending, so its blocks are yet to be taken.
    replica.receive(
        snapshot(last_booking=1, num_pending_prefill_tokens=50, num_waiting_reqs=1), 1.0
    )
    assert (replica.num_pending_prefill_tokens, replica.num_sequences) == (50, 1)
    assert replica.num_free_kv_tokens == 10_000 - 50
    assert replica.ledger.num_open == 1


def test_ttft_of_an_idle_engine_is_its_own_prefill():
    replica = known(make_replica())
    replica.receive(snapshot(), 0.0)
    assert replica.ttft_s(50, now_s=9.0) == pytest.approx(0.1 + 0.5)
    assert replica.ttft_s(250, now_s=9.0) == pytest.approx(3 * 0.1 + 2.5)  # three steps


def test_ttft_waits_for_the_rest_of_the_current_step_then_for_all_before_it():
    replica = known(make_replica())
    replica.receive(busy(num_pending_prefill_tokens=150, num_decoding_reqs=0), 10.0)
    replica.book(req("b", 40), num_kv_tokens=40, now_s=10.0)
    # The step under way computes 100 tokens in 1.1 s; 50 + 40 + 10 fit one more.
    assert replica.ttft_s(10, now_s=10.0) == pytest.approx(1.1 + 1.1)
    assert replica.ttft_s(10, now_s=10.6) == pytest.approx(0.5 + 1.1)
    assert replica.ttft_s(11, now_s=10.6) == pytest.approx(0.5 + 2 * 0.1 + 1.01)  # one too many


def test_a_step_that_lasts_longer_than_predicted_is_not_about_to_end():
    """It lasts for a quarter more of what it has lasted, were it predicted to end before that."""
    replica = known(make_replica())
    replica.receive(busy(num_pending_prefill_tokens=100, num_decoding_reqs=0), 10.0)
    assert replica.ttft_s(10, now_s=10.8) == pytest.approx(0.3 + 0.2)
    assert replica.ttft_s(10, now_s=11.0) == pytest.approx(0.25 * 1.0 + 0.2)
    assert replica.ttft_s(10, now_s=14.0) == pytest.approx(0.25 * 4.0 + 0.2)


def test_a_step_without_prefill_may_end_at_any_moment():
    replica = known(make_replica())
    replica.receive(busy(num_decoding_reqs=1), 10.0)
    assert replica.ttft_s(10, now_s=14.0) == pytest.approx(0.1 + 0.1, rel=0.05)


def test_decoding_requests_take_their_share_of_each_step():
    replica = known(make_replica())
    replica.receive(busy(num_decoding_reqs=60), 0.0)
    assert replica.ttft_s(80, now_s=9.0) == pytest.approx(2 * 0.1 + 0.8)


def test_an_idle_engine_began_with_the_first_request_it_got():
    replica = known(make_replica())
    replica.receive(snapshot(), 0.0)
    replica.book(req("a", 100), num_kv_tokens=100, now_s=5.0)
    assert replica.ttft_s(10, now_s=5.0) == pytest.approx(1.1 + 0.2)
    assert replica.ttft_s(10, now_s=5.6) == pytest.approx(0.5 + 0.2)


def test_a_snapshot_in_the_middle_of_a_step_does_not_begin_another():
    """The engine has read a request; the step that runs since 10 s goes on."""
    replica = known(make_replica())
    replica.receive(busy(1, num_steps_total=7, num_pending_prefill_tokens=100), 10.0)
    replica.receive(busy(2, num_steps_total=7, num_pending_prefill_tokens=100), 10.5)
    assert replica.ttft_s(10, now_s=10.5) == pytest.approx(0.6 + 0.2, rel=0.05)
    replica.receive(busy(3, num_steps_total=8), 11.2)
    assert replica.ttft_s(10, now_s=11.2) == pytest.approx(0.1 + 0.2)


def test_time_going_backwards_is_harmless():
    replica = known(make_replica())
    replica.receive(busy(), 10.0)
    assert replica.ttft_s(10, now_s=0.0) > 0.0


def test_progress_is_a_step_while_there_is_work():
    replica = make_replica()
    assert replica.step_wait_s(5.0) == (0.0, 0.0)
    replica.receive(busy(1, num_inflight_reqs=1, num_steps_total=7), 10.0)
    replica.receive(busy(2, num_inflight_reqs=1, num_steps_total=7), 12.0)
    assert replica.step_wait_s(13.0)[0] == 3.0
    replica.receive(busy(3, num_inflight_reqs=1, num_steps_total=8), 14.0)
    assert replica.step_wait_s(15.0)[0] == 1.0
    # vLLM's last word was of a running request; it was aborted, and nothing stepped since.
    replica.receive(busy(4, num_inflight_reqs=0, num_steps_total=8), 16.0)
    assert replica.step_wait_s(99.0) == (0.0, 0.0)


def test_a_slow_step_is_one_far_beyond_what_it_should_have_taken():
    settings = BreakerSettings(slow_factor=5.0, slow_floor_s=0.1)
    replica = known(make_replica())
    assert not was_step_slow(replica, stepped(1, 5.0, prefill=100), settings)  # 1.1 s expected
    assert was_step_slow(replica, stepped(1, 6.0, prefill=100), settings)
    assert not was_step_slow(replica, snapshot(1), settings)


def test_tpot_is_a_step_of_all_that_decode():
    replica = known(make_replica())
    replica.predictor.decode_s = 0.01
    replica.receive(busy(num_decoding_reqs=4), 0.0)
    replica.predictor.step_base_s, replica.predictor.decode_s = 0.1, 0.01
    assert replica.tpot_s(1) == pytest.approx(0.1 + 5 * 0.01)


@pytest.mark.parametrize(("prefill_tokens_per_s", "tpot_s"), [(250, 0.2), (400, 0.5), (900, 1.1)])
def test_tpot_allows_for_the_time_that_prompts_take(prefill_tokens_per_s, tpot_s):
    """A half of it, four fifths, and more than there is: then all steps are full ones."""
    replica = make_replica()
    for seq in range(800):
        total = seq * prefill_tokens_per_s // 10
        replica.receive(busy(seq, num_decoding_reqs=4, num_prefill_tokens_total=total), 0.1 * seq)
    predictor = replica.predictor
    predictor.step_base_s, predictor.decode_s, predictor.token_s = 0.05, 0.01, 0.002
    replica.token_s, replica.chunk_tokens = 0.002, 500
    assert replica.tpot_s(1) == pytest.approx(tpot_s, rel=0.1)


def test_what_an_engine_prefilled_before_we_met_it_counts_for_nothing():
    replica = known(make_replica())
    replica.receive(busy(num_decoding_reqs=4, num_prefill_tokens_total=1 << 40), 0.0)
    assert replica.tpot_s(1) == pytest.approx(replica.predictor.step_s(0, 5))


@given(
    num_sequences=st.integers(1, 50),
    size=st.integers(0, 300),
    mean_to_come=st.integers(1, 200),
)
def test_peak_growth_is_the_most_over_all_steps_to_come(num_sequences, size, mean_to_come):
    def tokens(t: float) -> float:
        return num_sequences * (size + t) * (1 - t / (2 * mean_to_come))

    steps = [t / 2 for t in range(4 * mean_to_come + 1)]  # by halves, where the maximum lies
    most = max(map(tokens, steps)) - num_sequences * size
    growth = peak_growth_tokens(num_sequences, num_sequences * size, num_sequences * mean_to_come)
    assert growth == pytest.approx(most, abs=1e-6)


def test_nothing_runs_so_nothing_grows():
    assert peak_growth_tokens(0, 0, 100) == peak_growth_tokens(3, 100, 0) == 0.0
    assert peak_growth_tokens(3, 100, -50) == 0.0


class TestLongPromptsAhead:
    """A short prompt passes the long ones, but for those of a lower EDF key."""

    @pytest.fixture
    def replica(self):
        replica = make_replica(max_prefill_chunk=50)
        replica.book(req("long", 500, edf_key_s=10.0), num_kv_tokens=500, now_s=0.0)
        return replica

    def test_a_long_one_due_sooner_keeps_its_part_of_the_step(self, replica):
        more_s = replica.ttft_s(20, 0.0, 11.0) - replica.ttft_s(20, 0.0, 9.0)
        assert more_s >= 50 * replica.token_s

    def test_until_it_is_prefilled(self, replica):
        replica.end_prefill("long")
        assert replica.ttft_s(20, 0.0, 11.0) == replica.ttft_s(20, 0.0, 9.0)

    def test_or_has_ended(self, replica):
        before_s = replica.ttft_s(20, 0.0, 11.0)
        replica.release("long")
        assert replica.ttft_s(20, 0.0, 11.0) < before_s

    def test_the_soonest_of_several_counts(self, replica):
        replica.book(req("sooner", 500, edf_key_s=5.0), num_kv_tokens=500, now_s=0.0)
        assert replica.ttft_s(20, 0.0, 6.0) > replica.ttft_s(20, 0.0, 4.0)
        replica.release("sooner")
        assert replica.ttft_s(20, 0.0, 6.0) == replica.ttft_s(20, 0.0, 4.0)

    def test_a_short_one_that_passes_delays_it_by_its_own_prefill(self, replica):
        pending = {"num_pending_prefill_tokens": 500, "num_step_demand_tokens": 50}
        replica.receive(busy(last_booking=1, **pending), 0.0)
        assert replica.passing_s(20, 9.0) == pytest.approx(20 * replica.token_s)
        assert replica.passing_s(20, 11.0) == 0.0

    def test_nobody_passes_what_the_next_step_ends(self, replica):
        """It is as good as prefilled, and who comes now waits for it."""
        pending = {"num_pending_prefill_tokens": 120, "num_step_demand_tokens": 50}
        replica.receive(busy(last_booking=1, **pending), 0.0)
        assert replica.passing_s(20, 9.0) == 0.0
        assert replica.ttft_s(20, 0.0, 9.0) == replica.ttft_s(20, 0.0, 11.0)

    def test_a_long_one_that_passes_delays_each_by_its_own_prefill(self, replica):
        replica.book(req("other", 500, edf_key_s=12.0), num_kv_tokens=500, now_s=0.0)
        assert replica.passing_s(300, 9.0) == pytest.approx(2 * 300 * replica.token_s)


class TestPromptsThatWait:
    """Where steps are limited as a whole, who is due sooner makes the others wait."""

    @pytest.fixture
    def replica(self):
        replica = make_replica()
        for request_id, num_tokens, edf_key_s in (("next", 50, 8.0), ("late", 200, 10.0)):
            request = req(request_id, num_tokens, edf_key_s=edf_key_s)
            replica.book(request, num_kv_tokens=num_tokens, now_s=0.0)
        return replica

    def test_it_delays_those_that_it_passes(self, replica):
        pending = {"num_pending_prefill_tokens": 250, "num_step_demand_tokens": 25}
        replica.receive(busy(last_booking=2, **pending), 0.0)
        assert 50 < 250 - replica.chunk_tokens <= 200  # left after this step, of the late one
        assert replica.passing_s(20, 11.0) == 0.0
        assert replica.passing_s(20, 9.0) == pytest.approx(20 * replica.token_s)

    def test_not_what_the_current_step_ends(self, replica):
        pending = {"num_pending_prefill_tokens": 60, "num_step_demand_tokens": 15}
        replica.receive(busy(last_booking=2, **pending), 0.0)
        assert replica.chunk_tokens >= 60
        assert replica.passing_s(20, 9.0) == 0.0

    def test_nor_what_is_prefilled(self, replica):
        pending = {"num_pending_prefill_tokens": 250, "num_step_demand_tokens": 25}
        replica.receive(busy(last_booking=2, **pending), 0.0)
        replica.end_prefill("late")
        assert replica.passing_s(20, 9.0) == 0.0
