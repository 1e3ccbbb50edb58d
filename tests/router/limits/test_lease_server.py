"""What does the lease server grant, count and take back? Message by message."""

import pytest

from router.limits.lease import LEASE_S, LeaseEvent, LeaseGrant, LeaseServer, LeaseUpdate
from router.limits.rate_limit import Amount, RateReport
from router.limits.settings import RateLimits

ONE, NOTHING = Amount(1, 10), Amount()


class Server:
    """A lease server, and the updates of the gateways that ask it."""

    def __init__(self, *, is_restart: bool = False, **limits: float) -> None:
        self.server = LeaseServer(RateLimits(**limits), 0.0, is_restart=is_restart)
        self.num_updates = 0

    def ask(self, now_s: float, *waiting: Amount, of: str = "g0", **fields) -> LeaseGrant:
        self.num_updates += 1
        update = LeaseUpdate(number=self.num_updates, waiting=list(waiting), **fields)
        return self.server.answer_update(of, update, now_s)

    def tell(self, now_s: float, *events: LeaseEvent, of: str = "g0", **fields) -> None:
        self.ask(now_s, of=of, events=list(events), **fields)

    def used(self, now_s: float) -> tuple[float, float, int]:
        """Requests and tokens that are used, and reservations that are open."""
        state = self.server.limiter.state(now_s)
        return state.requests.used, state.tokens.used, state.num_open


class TestGrants:
    def test_as_many_as_there_is_room_for_in_their_order(self):
        server = Server(rpm=3, tpm=100)
        grant = server.ask(0.0, ONE, Amount(1, 20), Amount(1, 75), ONE)
        assert grant.granted == Amount(2, 30)  # the last would fit, but it is not its turn
        assert grant.wait_s == pytest.approx(60.06)
        assert grant.number == 1
        assert server.used(0.0) == (2, 30, 0)
        assert grant.state.requests.used == 2

    def test_nothing_to_who_asks_for_nothing(self):
        grant = Server(rpm=3).ask(0.0)
        assert (grant.granted, grant.wait_s) == (NOTHING, 0.0)

    def test_on_top_of_what_is_left(self):
        server = Server(rpm=3)
        server.ask(0.0, ONE)
        assert server.ask(0.1, ONE, left=ONE).granted == ONE
        assert server.used(0.1)[0] == 2
        server.ask(0.2, left=ONE)  # one went back
        assert server.used(0.2)[0] == 1

    def test_to_several_gateways_out_of_the_same_limits(self):
        server = Server(rpm=4)
        assert server.ask(0.0, ONE, ONE, of="g0").granted == Amount(2, 20)
        assert server.ask(0.0, *[Amount(1, 0)] * 3, of="g1").granted == Amount(1, 0)
        assert server.used(0.0)[0] == 3

    def test_the_same_to_the_same_update(self):
        server = Server(rpm=3)
        grant = server.ask(0.0, ONE)
        again = server.server.answer_update("g0", LeaseUpdate(number=1, waiting=[ONE]), 1.0)
        assert again is grant
        assert server.used(1.0)[0] == 1

    def test_spaced_from_when_they_are_heard_of(self):
        """A lease server that does not know them any more hears what gateways have left."""
        server = Server(rpm=4)
        server.ask(10.0, left=Amount(3))
        assert server.ask(10.0, ONE, left=Amount(3)).wait_s == pytest.approx(
            0.5 * 60.06 * 3 / 4 - 0.05
        )

    def test_nothing_for_a_window_and_a_lease_after_a_restart(self):
        assert Server(is_restart=True, rpm=3).ask(0.0, ONE).wait_s == LEASE_S + 61.0
        assert Server(rpm=3).ask(0.0, ONE).granted == ONE


class TestCounts:
    def test_what_was_sent_from_when_it_was_sent(self):
        server = Server(rpm=9, tpm=900)
        server.ask(0.0, ONE)
        server.tell(3.0, LeaseEvent("sent", "a", 2.0, ONE))
        assert server.used(3.0) == (1, 10, 1)
        # Sent at 1 s, so counted by 6 s, unless it is known sooner.
        assert server.used(6.0 + 60.05)[0] == 1
        assert server.used(6.0 + 60.07)[0] == 0

    def test_nothing_as_sent_in_the_future(self):
        server = Server(rpm=9)
        server.tell(3.0, LeaseEvent("sent", "a", -50.0, ONE))
        assert server.used(8.0 + 60.05)[0] == 1
        assert server.used(8.0 + 60.07)[0] == 0

    def test_a_request_once(self):
        server = Server(rpm=9)
        for _ in range(2):
            server.tell(0.0, LeaseEvent("sent", "a", 0.0, ONE))
        server.tell(0.0, LeaseEvent("sent", "b", 0.0))  # of nothing
        server.tell(0.0, LeaseEvent("sent", "a", 0.0, ONE), of="g1")  # another one's
        assert server.used(0.0)[::2] == (2, 2)

    def test_what_was_answered_from_now(self):
        server = Server(rpm=9)
        server.tell(0.0, LeaseEvent("sent", "a", 0.0, ONE))
        server.tell(5.0, LeaseEvent("counted", "a", 4.0))
        assert server.used(5.0 + 60.0)[0] == 1
        assert server.used(5.0 + 60.1)[0] == 0

    @pytest.mark.parametrize(("counted", "tokens"), [(Amount(1, 4), 4), (None, 10)])
    def test_what_it_really_took(self, counted, tokens):
        server = Server(rpm=9, tpm=900)
        sent = LeaseEvent("sent", "a", 0.0, ONE)
        server.tell(0.0, sent, LeaseEvent("counted", "a", 0.0))
        server.tell(1.0, LeaseEvent("ended", "a", 0.0, counted))
        assert server.used(1.0) == (1, tokens, 0)
        server.tell(1.0, sent)  # it has ended: the id is free again
        assert server.used(1.0)[2] == 1

    def test_a_refused_request_and_not_its_tokens(self):
        server = Server(rpm=9, tpm=900)
        server.tell(0.0, LeaseEvent("sent", "a", 0.0, ONE))
        report = RateReport(retry_after_s=8.0)
        server.tell(1.0, LeaseEvent("refused", "a", 0.0, report=report))
        assert server.used(1.0) == (1, 0, 0)
        assert server.server.limiter.state(1.0).num_refused == 1
        assert server.ask(1.0, ONE).wait_s == 8.0
        server.tell(1.0, LeaseEvent("sent", "a", 0.0, ONE))
        assert server.used(1.0)[2] == 1

    def test_a_refusal_that_says_nothing(self):
        server = Server(rpm=9)
        server.tell(0.0, LeaseEvent("refused", "a", 0.0))
        assert server.ask(0.0, ONE).wait_s == 1.0

    def test_what_the_provider_reports(self):
        server = Server(rpm=9)
        report = RateReport(limit_requests=4, remaining_requests=0)
        server.tell(0.0, LeaseEvent("report", "", 0.0, report=report))
        server.tell(0.0, LeaseEvent("report", "", 0.0))  # nothing
        assert server.server.limiter.state(0.0).requests.limit == 4
        assert server.ask(0.0, ONE).wait_s > 59.0


class TestSilence:
    def test_ends_a_lease_and_counts_it_as_sent_then(self):
        server = Server(rpm=9, tpm=900)
        server.ask(0.0, ONE, ONE)
        server.tell(0.0, LeaseEvent("sent", "a", 0.0, ONE), left=ONE)
        server.ask(LEASE_S - 0.01, of="g1")
        assert server.used(LEASE_S - 0.01) == (2, 20, 1)
        server.ask(LEASE_S, of="g1")
        assert server.used(LEASE_S) == (2, 20, 0)
        assert server.used(LEASE_S + 60.0)[0] == 2
        assert server.used(LEASE_S + 60.1)[0] == 0

    def test_of_who_has_nothing_counts_nothing(self):
        server = Server(rpm=9)
        server.ask(0.0)
        server.ask(LEASE_S, of="g1")
        assert server.used(LEASE_S) == (0, 0, 0)

    def test_of_several_ends_each(self):
        server = Server(rpm=9)
        server.ask(0.0, ONE, of="well")
        for name in ("g1", "g2"):
            server.ask(0.0, ONE, of=name)
        server.ask(1.0, left=ONE, of="well")
        grant = server.ask(LEASE_S, of="g3")
        assert grant.state.requests.used == 3
        # Those of the two age; the one that is left does not.
        server.ask(LEASE_S + 1.0 - 0.01, left=NOTHING, of="well")
        assert server.used(LEASE_S + 60.1)[0] == 0

    def test_is_broken_by_the_same_update(self):
        server = Server(rpm=9)
        update = LeaseUpdate(number=1, waiting=[ONE])
        server.server.answer_update("g0", update, 0.0)
        server.server.answer_update("g0", update, 4.0)
        server.ask(LEASE_S + 3.9, of="g1")
        assert server.server.answer_update("g0", update, LEASE_S + 3.95).granted == ONE
        assert server.used(LEASE_S + 4.0 + 60.0)[0] == 1  # still leased

    def test_forgets_what_it_had_so_that_it_begins_anew(self):
        server = Server(rpm=9)
        update = LeaseUpdate(number=1, waiting=[ONE])
        server.server.answer_update("g0", update, 0.0)
        server.server.answer_update("g0", update, LEASE_S)
        assert server.used(LEASE_S)[0] == 2
