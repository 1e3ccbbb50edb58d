"""Generated event sequences with engines and providers: whatever happens, this holds."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from router.core.carry_out import carry_out
from router.core.router import Router
from router.core.settings import RouterSettings
from router.limits.rate_limit import RateReport
from router.providers.settings import FallbackSettings, ProviderSettings
from router.resilience.breaker import Failure
from router.types import (
    Dispatch,
    Evacuate,
    Fail,
    Fallback,
    Hold,
    Outcome,
    Reject,
    RejectReason,
    Usage,
    Withdraw,
)
from tests.support.builders import info, req, snapshot

MODELS = ["m", "m", "only-there", "ghost"]
ANY_REQUEST = st.integers(0, 9)
LIMITS = {"p0/x": 2, "p0/y": 1, "p1/default": 3}  # requests in a minute


def providers(*, with_second: bool = True) -> list[ProviderSettings]:
    settings = [
        {
            "name": "p0",
            "models": {"m": "theirs", "only-there": "theirs"},
            "keys": [{"name": "x", "rpm": 2, "tpm": 2000}, {"name": "y", "rpm": 1}],
            "price_prompt": 1.0,
            "max_cost_per_request": 0.003,
        },
        {
            "name": "p1",
            "models": {"m": "other"},
            "keys": [{"rpm": 3, "max_concurrency": 1}],
            "continues": True,
        },
    ]
    return [ProviderSettings.model_validate(each) for each in settings[: 1 + with_second]]


class Shell(RuleBasedStateMachine):
    """Carries decisions out, and knows from them alone where every request is."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.num_arrived = 0
        self.where: dict[str, str] = {}  # open requests: held, an engine, or a key
        self.started: set[str] = set()  # replies of providers that have begun
        self.silent: set[str] = set()  # of these, such as another has not gone on with yet
        self.ended: Counter[Outcome] = Counter()
        self.sent: dict[str, dict[str, float]] = {key_id: {} for key_id in LIMITS}

    @initialize(spill=st.sampled_from(["late", "full", "unavailable"]))
    def start(self, spill):
        self.spill = spill
        self.router = Router(RouterSettings(max_held_requests=4, max_hold_s=100.0))
        self.follow(self.router.providers.use(providers(), FallbackSettings(spill=spill), 0.0))

    def follow(self, decisions, entering: str | None = None) -> None:
        self.entering = entering
        carry_out(decisions, self)
        assert self.entering is None, "no decision about the request"

    def is_waiting(self, request_id: str) -> None:
        """Only what waits, or is just coming in, is decided about."""
        assert request_id == self.entering or self.where.get(request_id) == "held", request_id
        if request_id == self.entering:
            self.entering = None

    def dispatch(self, decision: Dispatch) -> None:
        self.is_waiting(decision.request_id)
        assert decision.request_id not in self.started
        self.where[decision.request_id] = decision.replica_id

    def fall_back(self, decision: Fallback) -> None:
        self.is_waiting(decision.request_id)
        self.send(decision.request_id, f"{decision.provider}/{decision.key}")

    def hold(self, decision: Hold) -> None:
        self.is_waiting(decision.request_id)
        self.where[decision.request_id] = "held"

    def reject(self, decision: Reject) -> None:
        self.is_waiting(decision.request_id)
        is_expired = decision.reason is RejectReason.EXPIRED
        self.end(decision.request_id, Outcome.EXPIRED if is_expired else Outcome.REJECTED)

    def fail(self, decision: Fail) -> None:
        self.is_waiting(decision.request_id)
        self.end(decision.request_id, Outcome.FAILED)

    def withdraw(self, decision: Withdraw) -> None:
        raise AssertionError(f"{decision} without hedging")

    def evacuate(self, decision: Evacuate) -> None:
        raise AssertionError(f"{decision} of an engine that is well")

    def send(self, request_id: str, key_id: str) -> None:
        # What has begun at a provider goes on at one that continues it, or nowhere.
        assert request_id not in self.started or key_id.startswith("p1/")
        if request_id in self.started:
            self.silent.add(request_id)
        self.where[request_id] = key_id
        log = self.sent[key_id]
        log[f"{request_id} {self.now_s} {len(log)}"] = self.now_s
        recent = [at_s for at_s in log.values() if at_s > self.now_s - 60.0]
        assert len(recent) <= LIMITS[key_id]

    def end(self, request_id: str, outcome: Outcome) -> None:
        self.where.pop(request_id, None)
        self.started.discard(request_id)
        self.silent.discard(request_id)
        self.ended[outcome] += 1

    def pick(self, number: int) -> str:
        """One of the open requests, or one that ended, or never was."""
        open_ids = list(self.where)
        return open_ids[number % len(open_ids)] if number and open_ids else "q0"

    def is_away(self, request_id: str) -> bool:
        return self.where.get(request_id) in LIMITS

    @rule(model=st.sampled_from(MODELS), num_tokens=st.sampled_from([1, 100, 1500, 9000]))
    def arrive(self, model, num_tokens):
        request_id = f"q{self.num_arrived}"
        self.num_arrived += 1
        request = req(request_id, num_tokens, model=model, arrival_s=self.now_s)
        self.follow(self.router.on_arrival(request, self.now_s), request_id)

    @rule(number=ANY_REQUEST)
    def first_token(self, number):
        request_id = self.pick(number)
        if self.is_away(request_id):
            self.started.add(request_id)
            self.silent.discard(request_id)
        self.router.providers.on_answer(request_id, RateReport(), self.now_s)
        assert self.router.on_first_token(request_id, self.now_s) == []

    @rule(number=ANY_REQUEST, usage=st.sampled_from([None, Usage(num_prompt_tokens=5)]))
    def finish(self, number, usage):
        request_id = self.pick(number)
        if self.where.get(request_id, "held") != "held":
            self.end(request_id, Outcome.COMPLETED)
        self.follow(self.router.on_finish(request_id, usage, self.now_s))

    @rule(number=ANY_REQUEST)
    def leave(self, number):
        request_id = self.pick(number)
        if request_id in self.where:
            self.end(request_id, Outcome.RENEGED)
        self.follow(self.router.on_cancel(request_id, self.now_s))

    @rule(number=ANY_REQUEST, retry_after_s=st.sampled_from([None, 0.0, 30.0]))
    def refused(self, number, retry_after_s):
        request_id = self.pick(number)
        if request_id in self.started - self.silent:
            return  # a 429 comes before any token
        entering = request_id if self.is_away(request_id) else None
        report = RateReport(retry_after_s=retry_after_s)
        decisions = self.router.providers.on_refused(request_id, report, self.now_s)
        self.follow(decisions, entering)

    @rule(
        number=ANY_REQUEST,
        failure=st.sampled_from(list(Failure)),
        was_sent=st.booleans(),
        lasts=st.booleans(),
        num_output_tokens=st.sampled_from([None, 0, 5]),
    )
    def provider_fails(self, number, failure, was_sent, lasts, num_output_tokens):
        request_id = self.pick(number)
        entering = request_id if self.is_away(request_id) else None
        if entering and not was_sent:
            log = self.sent[self.where[request_id]]
            last = [name for name in log if name.startswith(f"{request_id} ")]
            if last:  # else its key was forgotten meanwhile
                del log[last[-1]]
        decisions = self.router.providers.on_failed(
            request_id,
            failure,
            self.now_s,
            can_retry=request_id not in self.started,
            num_output_tokens=num_output_tokens,
            was_sent=was_sent,
            lasts=lasts,
        )
        self.follow(decisions, entering)

    @rule()
    def engine_comes(self):
        self.follow(self.router.on_replica_up("r0", info(num_kv_tokens=2000), self.now_s))

    @rule()
    def engine_drains(self):
        self.follow(self.router.on_replica_draining("r0", self.now_s))

    @rule(num_pending_prefill_tokens=st.sampled_from([0, 500, 50_000]), seq=st.integers(0, 99))
    def engine_reports(self, num_pending_prefill_tokens, seq):
        state = snapshot(seq, num_pending_prefill_tokens=num_pending_prefill_tokens)
        self.follow(self.router.on_snapshot("r0", state, self.now_s))

    @rule(with_second=st.booleans())
    def reload(self, with_second):
        fallback = FallbackSettings(spill=self.spill)
        self.follow(
            self.router.providers.use(providers(with_second=with_second), fallback, self.now_s)
        )
        if not with_second:  # its budget is forgotten with it
            self.sent["p1/default"].clear()

    @rule(seconds=st.sampled_from([0.01, 0.3, 5.0, 61.0]))
    def wait(self, seconds):
        self.now_s += seconds
        self.follow(self.router.on_tick(self.now_s))

    @invariant()
    def the_router_knows_where_everything_is(self):
        if not hasattr(self, "router"):
            return
        state = self.router.state(self.now_s)
        places = list(self.where.values())
        assert state.held.num_requests == places.count("held")
        assert state.num_placed == places.count("r0")
        assert state.fallback.num_open == sum(place in LIMITS for place in places)
        assert self.router.outcomes == self.ended
        assert sum(self.ended.values()) + len(self.where) == self.num_arrived
        if "held" in places:
            assert self.router.next_wake_s() is not None

    def teardown(self):
        if not hasattr(self, "router"):
            return
        for request_id in list(self.where):
            self.router.on_cancel(request_id, self.now_s)
        for provider in self.router.state(self.now_s + 90_000.0).fallback.providers.values():
            for key in provider.keys.values():
                budget = key.budget
                assert budget.num_open == key.breaker.num_open_calls == 0
                windows = (budget.requests, budget.tokens, budget.cost_day)
                assert not any(window.used for window in windows)


TestFallbackInvariants = Shell.TestCase
TestFallbackInvariants.settings = settings(deadline=None)
