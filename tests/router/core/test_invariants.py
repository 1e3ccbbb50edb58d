"""Generated event sequences: whatever happens, in whatever order, this holds.

The shell in `generated_shell.py` follows what the router decides. Hypothesis prints the
shortest failing sequence as a program, and what brings it back (`tests/conftest.py`
says how to look through more of them).
"""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from router.resilience.breaker import BreakerState, Failure
from router.scheduling.ablation import PARTS
from router.scheduling.policies import POLICIES
from router.types import BlockUpdate, Outcome, RequestClass, Usage
from tests.router.core.generated_shell import (
    BLOCK_TOKENS,
    MAX_BYTES,
    MAX_REQUESTS,
    MAX_TOKENS,
    MAX_TURNS,
    NAMES,
    TURN_TOKENS,
    Engine,
    Shell,
    kv_blocks,
)
from tests.support.builders import after_json, info, req, snapshot

SIZES = st.sampled_from([0, 1, 30, 120, 900, 3000])
ENGINES = st.sampled_from(sorted(NAMES))
ANY_REQUEST = st.integers(0, 9)  # see `Shell.pick`
TALKS = st.sampled_from([1, 2])  # conversations
MAX_OUTPUT_TOKENS = 400  # of any answer, so no prediction may pass it
MAX_NUM_SEQS = 8  # of each engine


class Events(Shell):
    """What clients, engines and time do, and what always holds."""

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        hold=st.sampled_from([None, True, False]),
        tpot_target_s=st.sampled_from([{}, {"m": 1e-9}, {"m": 0.0205, "*": 10.0}]),
        max_late_s=st.sampled_from([None, 0.01, 1.0]),
    )
    def start(self, policy, hold, tpot_target_s, max_late_s):
        self.make_router(policy, hold=hold, tpot_target_s=tpot_target_s, max_late_s=max_late_s)
        for replica_id in NAMES:
            self.up(replica_id)

    # Requests

    @rule(
        model=st.sampled_from(["m", "m", "m", "lora", "n", "ghost"]),
        num_tokens=SIZES,
        num_sequences=st.integers(1, 3),
        num_bytes=st.sampled_from([0, 150]),
        patience_s=st.sampled_from([0.02, 0.5, 5.0, float("inf")]),
        max_output_tokens=st.sampled_from([None, 1, 50]),
        tenant=st.sampled_from(["", "a", "b"]),
        priority_class=st.sampled_from(RequestClass),
    )
    def arrive(self, model, num_tokens, patience_s, max_output_tokens, tenant="", **fields):
        request = req(
            f"q{self.num_arrived}",
            num_tokens,
            model=model,
            arrival_s=self.now_s,
            deadline_s=self.now_s + patience_s,
            max_output_tokens=max_output_tokens,
            tenant=tenant,
            weight=3.0 if tenant == "a" else 1.0,
            **fields,
        )
        self.num_arrived += 1
        is_limited = max_output_tokens is not None and "length" not in self.ablate
        self.limits[request.id] = max_output_tokens if is_limited else MAX_OUTPUT_TOKENS
        self.follow(self.router.on_arrival(request, self.now_s), entering=request)

    @rule(talk=TALKS, num_turns=st.sampled_from([1, 2, MAX_TURNS]))
    def arrive_with_prefix(self, talk, num_turns):
        """A turn of a conversation: its text is that of the turns before, and more."""
        self.arrive(
            model="m",
            num_tokens=TURN_TOKENS * num_turns,
            patience_s=float("inf"),
            max_output_tokens=None,
            prefix_hashes=tuple(100 * talk + turn for turn in range(num_turns)),
            prefix_block_share=1.0 / num_turns,
        )

    @rule(number=ANY_REQUEST)
    def arrive_again(self, number):
        request_id = self.pick(number)
        if request_id in self.held or request_id in self.placed:
            assert self.router.on_arrival(req(request_id), self.now_s) == []

    @rule(
        number=ANY_REQUEST,
        end=st.sampled_from(["finish", "cancel"]),
        usage=st.none()
        | st.builds(Usage, num_output_tokens=st.sampled_from([0, 1, 20, MAX_OUTPUT_TOKENS])),
    )
    def end(self, number, end, usage):
        """Any id: placed, held, ended or never seen."""
        request_id = self.pick(number)
        was_placed = self.take_back(request_id) is not None
        if end == "finish":
            self.ended[Outcome.COMPLETED] += was_placed
            decisions = self.router.on_finish(request_id, usage, self.now_s)
        else:
            was_held = self.held.pop(request_id, None) is not None
            self.ended[Outcome.RENEGED] += was_placed or was_held
            decisions = self.router.on_cancel(request_id, self.now_s)
        self.follow(decisions)

    @rule(
        number=ANY_REQUEST,
        failure=st.sampled_from([None, Failure.ERROR, Failure.TIMEOUT]),
        can_retry=st.booleans(),
        num_output_tokens=st.sampled_from([0, 0, 7, 100]),
    )
    def attempt_fails(self, number, failure, can_retry, num_output_tokens):
        self.fail_attempt(
            self.pick(number),
            failure,
            can_retry=can_retry,
            has_begun=num_output_tokens > 0,
            num_output_tokens=num_output_tokens,
        )

    @rule(number=ANY_REQUEST)
    def first_token(self, number):
        assert self.router.on_first_token(self.pick(number), self.now_s) == []

    @rule(number=ANY_REQUEST)
    def tokenise(self, number):
        """Its engine tells what the prompt consists of, if it has any."""
        request_id = self.pick(number)
        request, engine = self.placed.get(request_id, (None, None))
        if request is None or not request.prefix_hashes:
            self.router.on_prompt(request_id, "r0", 100, [1, 2, 3])
            return
        talk, num_turns = request.prefix_hashes[-1] // 100, len(request.prefix_hashes)
        blocks = kv_blocks(talk, 0, num_turns * TURN_TOKENS // BLOCK_TOKENS)
        self.router.on_prompt(request_id, engine.replica_id, request.num_prompt_tokens, blocks)
        if engine.coming.pop(request_id, None) is not None:  # else nobody wants to know it
            self.num_turns_known[talk] = max(self.num_turns_known[talk], num_turns)

    # Engines

    @rule(replica_id=ENGINES)
    def up(self, replica_id):
        """Also while it is up: a new connection, whose old requests fail one by one later."""
        model, *aliases = NAMES[replica_id]
        self.lose(replica_id)
        self.engines[replica_id] = Engine(replica_id, calls=self.lost.pop(replica_id, set()))
        engine = info(
            model=model,
            aliases=tuple(aliases),
            max_num_seqs=MAX_NUM_SEQS,
            num_kv_tokens=2000,
            heartbeat_s=0.5,
        )
        self.follow(self.router.on_replica_up(replica_id, engine, self.now_s))

    @rule(replica_id=ENGINES)
    def drain(self, replica_id):
        if replica_id in self.engines:
            self.engines[replica_id].accepts_work = False
        self.follow(self.router.on_replica_draining(replica_id, self.now_s))

    @rule(replica_id=ENGINES)
    def down(self, replica_id):
        self.lose(replica_id)
        self.follow(self.router.on_replica_down(replica_id, self.now_s))

    @rule(
        replica_id=ENGINES,
        step=st.sampled_from([1, 1, 1, 5, 0, -1]),
        num_pending_prefill_tokens=SIZES,
        num_running_reqs=st.integers(0, 9),
        num_inflight_reqs=st.integers(0, 1),
        num_steps_total=st.integers(0, 3),
        step_s=st.sampled_from([0.0, 0.1, 9.0]),
        num_free_kv_tokens=st.sampled_from([0, 200, 1100, 2000]),
        acknowledges=st.sampled_from([0, 1, 99]),
    )
    def report(self, replica_id, step, acknowledges, num_running_reqs, **fields):
        """In order, with a gap, repeated or late; from an engine that may be unknown."""
        engine = self.engines.get(replica_id, Engine(replica_id))
        acknowledged = min(engine.last_booking, engine.report.last_booking + acknowledges)
        report = snapshot(
            engine.report.seq + step,
            last_booking=acknowledged,
            num_running_reqs=num_running_reqs,
            num_decoding_reqs=num_running_reqs,
            **fields,
        )
        if step > 0:
            engine.report = report
        self.follow(self.router.on_snapshot(replica_id, report, self.now_s))

    @rule(
        replica_id=ENGINES,
        talk=TALKS,
        num_blocks=st.integers(0, MAX_TURNS * TURN_TOKENS // BLOCK_TOKENS),
        telling=st.sampled_from(["news", "news", "all", "lost"]),
    )
    def cache(self, replica_id, talk, num_blocks, telling):
        """Its cache takes in or drops blocks, and it tells; or that never arrives."""
        engine = self.engines.get(replica_id, Engine(replica_id))
        num_before, engine.cached[talk] = engine.cached[talk], num_blocks
        since, engine.position = engine.position, engine.position + abs(num_blocks - num_before)
        if telling == "lost":
            return
        if telling == "all":
            cached = [b for each, num in engine.cached.items() for b in kv_blocks(each, 0, num)]
            update = BlockUpdate(since=-1, until=engine.position, stored=cached)
        else:
            stored = kv_blocks(talk, num_before, num_blocks)
            removed = kv_blocks(talk, num_blocks, num_before)
            update = BlockUpdate(since=since, until=engine.position, stored=stored, removed=removed)
        is_whole = telling == "all" or since == engine.told_position
        if is_whole:
            engine.told, engine.told_position = Counter(engine.cached), engine.position
        else:
            engine.told = Counter()
        is_known = replica_id in self.engines
        assert self.router.on_blocks(replica_id, update) is (is_whole or not is_known)

    @rule(replica_id=ENGINES)
    def become_idle(self, replica_id):
        self.report(
            replica_id,
            step=1,
            acknowledges=99,
            num_running_reqs=0,
            num_free_kv_tokens=1984,
            num_pending_prefill_tokens=0,
        )

    # Time and people

    @rule(seconds=st.sampled_from([0.0, 0.1, 3.0, 100.0, -5.0]))
    def tick(self, seconds):
        self.now_s += seconds
        self.follow(self.router.on_tick(self.now_s))

    @rule()
    def wake(self):
        """Whoever wakes when told rejects in time, and looks after the engines."""
        wake_s = self.router.next_wake_s()
        assert (wake_s is None) == (not (self.held or (self.placed and self.engines)))
        if wake_s is not None:
            assert wake_s <= min(map(self.expires_s, self.held.values()), default=wake_s)
            self.now_s = max(self.now_s, wake_s)
            self.follow(self.router.on_tick(self.now_s))
            assert all(self.expires_s(request) > self.now_s for request in self.held.values())

    @rule(policy=st.sampled_from(sorted(POLICIES)), ablate=st.sets(st.sampled_from(PARTS)))
    def switch(self, policy, ablate):
        self.policy, self.ablate = policy, frozenset(ablate)
        self.follow(self.router.set_policy(policy, self.now_s, ablate))

    # What always holds

    @invariant()
    def every_request_is_in_one_place(self):
        state = self.router.state(self.now_s)
        assert state.held.num_requests == len(self.held)
        assert state.num_placed == len(self.placed)
        assert +self.router.outcomes == +self.ended
        assert self.num_arrived == len(self.held) + len(self.placed) + self.ended.total()

    @invariant()
    def the_queue_is_bounded(self):
        """Beyond its bounds there is only what had been placed before."""
        held = self.router.state(self.now_s).held
        assert held.num_tokens == sum(r.num_prompt_tokens for r in self.held.values())
        assert held.num_bytes == sum(r.num_bytes for r in self.held.values())
        new = [r for r in self.held.values() if not self.num_attempts[r.id]]
        assert len(new) <= MAX_REQUESTS
        assert sum(r.num_prompt_tokens for r in new) <= MAX_TOKENS
        assert sum(r.num_bytes for r in new) <= MAX_BYTES

    @invariant()
    def ledgers_count_what_is_open_and_what_is_on_its_way(self):
        replicas = self.router.state(self.now_s).replicas
        assert replicas.keys() == self.engines.keys()
        for replica_id, engine in self.engines.items():
            ledger = replicas[replica_id].ledger
            sizes = [
                self.num_booked_tokens[request_id]
                for request_id, number in engine.bookings.items()
                if number > engine.report.last_booking
            ]
            assert ledger.num_open == len(engine.bookings)
            assert ledger.num_unacknowledged == len(sizes)
            assert ledger.num_prefill_tokens == sum(sizes)
            assert (ledger.num_kv_tokens > 0) == bool(sizes)

    @invariant()
    def what_is_cached_is_what_was_told_without_a_gap(self):
        replicas = self.router.state(self.now_s).replicas
        for replica_id, engine in self.engines.items():
            assert replicas[replica_id].num_cached_blocks == engine.told.total()

    @invariant()
    def nobody_waits_for_an_idle_engine(self):
        holds = self.router.state(self.now_s).holds
        breakers = self.breakers()
        quarantined = self.quarantined()
        for replica_id, engine in self.engines.items():
            breaker = breakers[replica_id]
            # Slow start goes by calls: idle by its report, it may have one whose end is on its way.
            num_calls = max(1.0, breaker.share * MAX_NUM_SEQS)
            is_full = breaker.share < 1.0 and len(engine.calls) >= num_calls
            if breaker.state is not BreakerState.CLOSED or is_full or replica_id in quarantined:
                continue
            if engine.accepts_work and (engine.is_idle or not holds):
                assert self.waiting_for(replica_id) == []

    @invariant()
    def a_quarantined_engine_has_its_suspect_or_will_have_it(self):
        """Or its suspect was on it when it was lost, of which the shell has yet to tell."""
        for replica_id in self.quarantined():
            holder = self.router._placer._quarantine._claims[replica_id]
            at_engine = self.router._attempts.get(holder.id, replica_id)
            assert holder.id in self.router._queue or at_engine is not None
            held = self.router._queue.get(holder.id)
            assert held is None or held.is_suspect

    @invariant()
    def breakers_know_the_calls_and_nobody_waits_to_be_a_probe(self):
        """That there is one at a time, `send` checks."""
        breakers = self.breakers()
        for replica_id, engine in self.engines.items():
            breaker = breakers[replica_id]
            assert breaker.num_open_calls == len(engine.calls)
            assert (breaker.reason is None) == (breaker.state is BreakerState.CLOSED)
            if breaker.state is not BreakerState.HALF_OPEN:
                self.probes.pop(replica_id, None)
            elif (
                engine.accepts_work
                and engine.is_idle
                and self.probes.get(replica_id) not in engine.calls
            ):
                assert self.waiting_for(replica_id) == []

    def teardown(self):
        """When the load is gone, so is every booking."""
        after_json(self.router.state(self.now_s))
        while self.held or self.placed:
            while self.held:  # who leaves may make room for others
                request_id = next(iter(self.held))
                del self.held[request_id]
                self.ended[Outcome.RENEGED] += 1
                self.follow(self.router.on_cancel(request_id, self.now_s))
            for request_id in list(self.placed):
                self.take_back(request_id)
                self.ended[Outcome.COMPLETED] += 1
                self.follow(self.router.on_finish(request_id, None, self.now_s))
        self.every_request_is_in_one_place()
        self.ledgers_count_what_is_open_and_what_is_on_its_way()
        assert self.router.next_wake_s() is None


Events.TestCase.settings = settings(
    max_examples=max(300, settings().max_examples),  # this is where the router is held to its word
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    database=None,
)


# A tenth of a second each; shrinking a failure to something readable takes minutes.
@pytest.mark.timeout(600 + Events.TestCase.settings.max_examples)
class TestInvariants(Events.TestCase):
    pass
