"""How does a simulated gateway carry out decisions? A router and a shell around it.

The counterpart in virtual time of `serving.gateway.driver`.
"""

import zlib
from operator import itemgetter

import msgspec

from router import (
    Decision,
    Dispatch,
    EngineSnapshot,
    Evacuate,
    Fail,
    Fallback,
    Hold,
    Outcome,
    Reject,
    RejectReason,
    Request,
    RouterSettings,
    Usage,
    Withdraw,
    carry_out,
)
from router.limits.rate_limit import RateReport
from router.simulation.engine.sequence import Job, Progress
from router.simulation.events import Exchange, NeedsSnapshots, Receiver, World
from router.simulation.node import Node, SnapshotMessage
from router.types import HEARTBEAT_S, PREFIX_BLOCK_TOKENS

_BYTES_PER_TOKEN = 4

_arrival_s = itemgetter(0)  # of a message


class Gateway(Receiver[Node]):
    """Carries out what its router decides.

    While it holds requests it listens: every snapshot that arrives is an event of its own, for
    it may release one of them. Otherwise snapshots wait until the router is called, and are
    delivered first, each with the time of its arrival (`deliver_snapshots`). In a calm run they
    wait until the router is asked for a decision: what an engine computes, and what the router
    learns of it, do not depend on one another.
    """

    def __init__(self, simulation: World[Node], settings: RouterSettings, number: int) -> None:
        super().__init__(number, settings, listens=simulation.always_listens)
        self._simulation = simulation
        self._max_hold_s = settings.max_hold_s
        self._model = ""
        self._exchanges: dict[str, Exchange] = {}  # by request, until it ends
        self._held: set[str] = set()  # of these
        self._streams: dict[str, dict[str, Exchange]] = {}  # by engine and job
        self._wake_s: float | None = None
        self._wants_prefix = self.router.discipline.wants_prefix

    def has_streams(self, node: Node) -> bool:
        """Whether a request of ours is on the engine, or on its way there or back."""
        return bool(self._streams.get(node.id))

    # Clients

    def on_arrival(self, number: int) -> None:
        """Pass the workload's request of this number to the router."""
        simulation = self._simulation
        now_s = simulation.now_s
        arrival = simulation.workload.arrivals[number]
        self.deliver_snapshots()
        hashes: tuple[int, ...] = ()
        end_hash = answered_hash = 0
        if self._wants_prefix:
            hashes = arrival.block_hashes(PREFIX_BLOCK_TOKENS)
            end_hash = arrival.text_hash(arrival.num_prompt_tokens)
            answered_hash = arrival.text_hash(arrival.num_said_tokens)
        request = Request(
            id=str(number),
            model=self._model,
            num_prompt_tokens=arrival.num_prompt_tokens,
            max_output_tokens=arrival.max_output_tokens,
            num_bytes=arrival.num_prompt_tokens * _BYTES_PER_TOKEN,
            tenant=arrival.tenant,
            priority_class=arrival.priority_class,
            arrival_s=now_s,
            deadline_s=now_s + self._max_hold_s,
            prefix_hashes=hashes,
            prefix_block_share=PREFIX_BLOCK_TOKENS / arrival.num_prompt_tokens,
            session=zlib.crc32(arrival.session.encode()) if arrival.session else 0,
            end_hash=end_hash,
            answered_hash=answered_hash,
            answered_share=arrival.num_heard_tokens / arrival.num_prompt_tokens,
        )
        self._exchanges[request.id] = Exchange(number, request)
        self._execute(self.router.on_arrival(request, now_s))

    # Engines

    def deliver_snapshots(self) -> None:
        """Deliver to the router the snapshots that have arrived by now, in order of arrival."""
        simulation = self._simulation
        if not simulation.reports:
            return  # each is an event
        now_s = simulation.now_s
        arrived: list[SnapshotMessage] = []
        for node in simulation.nodes.values():
            if node.next_push_s <= now_s:
                node.push_due_snapshots(now_s)
            snapshots = node.channels[self.number].snapshots
            while snapshots and snapshots[0][0] < now_s:
                arrived.append(snapshots.popleft())
        if len(arrived) > 1:
            arrived.sort(key=_arrival_s)
        for message in arrived:
            decisions = self._deliver_snapshot(message)
            assert not decisions, "a snapshot led to a decision though no gateway listened"

    def on_snapshot(self, _: Node) -> None:
        """Deliver the snapshots that have arrived; one of them may release a held request.

        Those of the same time go in the order of the engines, whenever they were sent: each
        may release the next request.
        """
        now_s = self._simulation.now_s
        for node in self._simulation.nodes.values():
            snapshots = node.channels[self.number].snapshots
            while snapshots and snapshots[0][0] <= now_s and node.is_up:
                self._execute(self._deliver_snapshot(snapshots.popleft()))

    def _deliver_snapshot(self, message: SnapshotMessage) -> list[Decision]:
        arrived_s, snapshot, update, node = message
        if update is not None and not self.router.on_blocks(node.id, update):
            simulation = self._simulation
            simulation.call_at(
                simulation.now_s + simulation.network.submit_s, node.resend_all_blocks, self
            )
        return self.router.on_snapshot(node.id, snapshot, arrived_s)

    def on_replica_up(self, node: Node) -> None:
        self.deliver_snapshots()
        self._model = node.engine.info.model
        self._streams[node.id] = {}
        info = msgspec.structs.replace(node.engine.info, heartbeat_s=HEARTBEAT_S)
        self._execute(self.router.on_replica_up(node.id, info, self._simulation.now_s))

    def on_replica_draining(self, node: Node) -> None:
        self.deliver_snapshots()
        now_s, drains = self._simulation.now_s, node.is_draining
        self._execute(self.router.on_replica_draining(node.id, now_s, is_draining=drains))

    def on_step(self, message: tuple[Node, list[Job], list[Progress]]) -> None:
        """Pass a step's results to the router: prompts' blocks, first tokens, ends."""
        node, jobs, progresses = message
        if not node.is_up:
            return
        simulation = self._simulation
        if self.listens or not simulation.is_calm:
            self.deliver_snapshots()
        segment_tokens = simulation.segment_tokens
        streams = self._streams[node.id]
        for job in jobs:
            if (exchange := streams.get(job.id)) is not None:
                hashes = list(job.block_hashes[: job.num_prompt_tokens // segment_tokens])
                self.router.on_prompt(exchange.request.id, node.id, job.num_prompt_tokens, hashes)
        if progresses:
            self._receive(node, progresses)

    def _receive(self, node: Node, progresses: list[Progress]) -> None:
        simulation = self._simulation
        now_s, journal = simulation.now_s, simulation.journal
        for progress in progresses:
            exchange = self._streams[node.id].get(progress.job_id)
            if exchange is None:
                continue  # moved off that engine while this was under way
            request_id = exchange.request.id
            if exchange.awaits_first_token:
                exchange.awaits_first_token = False
                if not exchange.has_begun:
                    exchange.has_begun = True
                    journal.first_s[exchange.number] = now_s
                self._execute(self.router.on_answer(request_id, node.id, now_s))
                self._execute(self.router.on_first_token(request_id, now_s))
            if progress.finished:
                arrival = simulation.workload.arrivals[exchange.number]
                usage = Usage(
                    num_prompt_tokens=arrival.num_prompt_tokens,
                    num_cached_tokens=progress.num_cached_tokens,
                    num_output_tokens=arrival.num_output_tokens,
                    last_block=arrival.last_block(simulation.segment_tokens),
                )
                journal.num_cached_tokens[exchange.number] = progress.num_cached_tokens
                journal.num_preemptions_each[exchange.number] += progress.num_preemptions
                del self._streams[node.id][progress.job_id], exchange.jobs[node.id]
                self._end_request(request_id, Outcome.COMPLETED)
                self._execute(self.router.on_finish(request_id, usage, now_s))

    def on_replica_down(self, node: Node) -> None:
        """Report the engine as down, then each of its requests as failed there.

        In this order, so that none of them is sent back to it.
        """
        lost = self._streams.pop(node.id, {})
        self._execute(self.router.on_replica_down(node.id, self._simulation.now_s))
        for job_id, exchange in lost.items():
            self._fail_attempt(node, job_id, exchange)

    def _fail_attempt(self, node: Node, job_id: str, exchange: Exchange) -> None:
        """Report that an engine did not complete a request; another may continue it."""
        del exchange.jobs[node.id]
        num_output_tokens = 0
        if not exchange.jobs:  # otherwise the other attempt has its own
            num_output_tokens = node.num_output_tokens(job_id)
            exchange.num_output_tokens += num_output_tokens
            exchange.awaits_first_token = True
        self._execute(
            self.router.failures.on_attempt_failed(
                exchange.request.id,
                node.id,
                None,
                self._simulation.now_s,
                has_begun=exchange.has_begun,
                num_output_tokens=num_output_tokens,
            )
        )

    def on_refused_as_busy(self, message: tuple[Node, str, EngineSnapshot]) -> None:
        """Report what the engine has, then that it gives a job back: it has not begun it."""
        node, job_id, snapshot = message
        if not node.is_up:
            return
        self.deliver_snapshots()
        now_s = self._simulation.now_s
        self._execute(self.router.on_snapshot(node.id, snapshot, now_s))
        if (exchange := self._streams[node.id].pop(job_id, None)) is None:
            return  # cancelled while this was under way
        del exchange.jobs[node.id]
        request_id, failures = exchange.request.id, self.router.failures
        self._execute(failures.on_refused_as_busy(request_id, node.id, now_s))

    # Decisions

    def _execute(self, decisions: list[Decision]) -> None:
        carry_out(decisions, self)
        if self.listens != bool(self._held):
            self._set_listening(bool(self._held))
        wake_s = self.router.next_wake_s()
        if wake_s != self._wake_s:
            self._wake_s = wake_s
            if wake_s is not None:
                simulation = self._simulation
                simulation.call_at(max(wake_s, simulation.now_s), self._tick, wake_s)

    def _set_listening(self, listens: bool) -> None:
        """Start, or stop, making every snapshot that arrives an event."""
        simulation = self._simulation
        if simulation.always_listens:
            return
        if not listens:
            simulation.num_listening -= 1
            self.listens = False
            return
        for node in simulation.nodes.values():
            node.push_due_snapshots(simulation.now_s)
        simulation.num_listening += 1
        self.listens = True
        for node in simulation.nodes.values():
            node.schedule_push()
            for arrived_s, *_ in node.channels[self.number].snapshots:
                simulation.call_at(arrived_s, self.on_snapshot, node)

    def _tick(self, wake_s: float) -> None:
        if wake_s == self._wake_s:
            self._wake_s = None
            self.deliver_snapshots()
            self._execute(self.router.on_tick(self._simulation.now_s))

    def hold(self, decision: Hold) -> None:
        if not self._simulation.reports:
            raise NeedsSnapshots
        self._held.add(decision.request_id)

    def dispatch(self, decision: Dispatch) -> None:
        self._held.discard(decision.request_id)
        simulation = self._simulation
        exchange = self._exchanges[decision.request_id]
        node = simulation.nodes[decision.replica_id]
        arrival = simulation.workload.arrivals[exchange.number]
        if not (exchange.has_begun or exchange.jobs):
            simulation.journal.placed_s[exchange.number] = simulation.now_s
        job = Job(
            # An engine may get the same request twice, each time as another job.
            id=f"{exchange.number}.{exchange.num_jobs}",
            num_prompt_tokens=arrival.num_prompt_tokens + exchange.num_output_tokens,
            num_output_tokens=max(1, arrival.num_output_tokens - exchange.num_output_tokens),
            priority=simulation.priority_of(self, exchange.request, arrival),
            block_hashes=arrival.block_hashes(simulation.segment_tokens, with_reply=True),
            num_expected_cached_tokens=decision.num_cached_tokens,
        )
        exchange.num_jobs += 1
        exchange.jobs[node.id] = job.id
        self._streams[node.id][job.id] = exchange
        arrive_s = simulation.now_s + simulation.network.submit_s
        simulation.call_at(
            arrive_s, node.submit_job, (self, decision.booking, job, decision.max_pending_tokens)
        )

    def withdraw(self, decision: Withdraw) -> None:
        exchange = self._exchanges[decision.request_id]
        self._cancel_job(decision.replica_id, exchange.jobs.pop(decision.replica_id))

    def reject(self, decision: Reject) -> None:
        if not self._simulation.reports:
            raise NeedsSnapshots
        is_expired = decision.reason is RejectReason.EXPIRED
        self._end_request(decision.request_id, Outcome.EXPIRED if is_expired else Outcome.REJECTED)

    def fail(self, decision: Fail) -> None:
        self._end_request(decision.request_id, Outcome.FAILED)

    def evacuate(self, decision: Evacuate) -> None:
        node = self._simulation.nodes[decision.replica_id]
        for job_id, exchange in list(self._streams[node.id].items()):
            self._cancel_job(node.id, job_id)
            self._fail_attempt(node, job_id, exchange)

    def _cancel_job(self, replica_id: str, job_id: str) -> None:
        """Send an engine the order to stop a job."""
        simulation = self._simulation
        del self._streams[replica_id][job_id]
        arrive_s = simulation.now_s + simulation.network.submit_s
        simulation.call_at(arrive_s, simulation.nodes[replica_id].cancel_job, job_id)

    def fall_back(self, decision: Fallback) -> None:
        self._held.discard(decision.request_id)
        simulation = self._simulation
        exchange = self._exchanges[decision.request_id]
        simulation.journal.placed_s[exchange.number] = simulation.now_s
        arrive_s = simulation.now_s + simulation.network.submit_s
        simulation.call_at(arrive_s, self._call_provider, (decision, exchange))

    def _call_provider(self, message: tuple[Fallback, Exchange]) -> None:
        """Have a provider answer, or refuse, the request that has reached it."""
        decision, exchange = message
        simulation = self._simulation
        arrival = simulation.workload.arrivals[exchange.number]
        times_s, report = simulation.providers[decision.provider].answer_request(
            arrival.num_prompt_tokens, arrival.num_output_tokens, simulation.now_s
        )
        if times_s is None:
            refused_s = simulation.now_s + simulation.network.reply_s
            simulation.call_at(refused_s, self._on_refused, (exchange.request.id, report))
            return
        first_s = simulation.now_s + times_s[0]
        simulation.call_at(first_s, self._on_provider_first_token, (exchange, report))
        simulation.call_at(first_s + times_s[1], self._on_provider_finish, exchange)

    def _on_refused(self, message: tuple[str, RateReport]) -> None:
        request_id, report = message
        now_s = self._simulation.now_s
        self._execute(self.router.providers.on_refused(request_id, report, now_s))

    def _on_provider_first_token(self, message: tuple[Exchange, RateReport]) -> None:
        exchange, report = message
        now_s, request_id = self._simulation.now_s, exchange.request.id
        self._simulation.journal.first_s[exchange.number] = now_s
        self._execute(self.router.providers.on_answer(request_id, report, now_s))
        self._execute(self.router.on_first_token(request_id, now_s))

    def _on_provider_finish(self, exchange: Exchange) -> None:
        simulation, request_id = self._simulation, exchange.request.id
        arrival = simulation.workload.arrivals[exchange.number]
        usage = Usage(
            num_prompt_tokens=arrival.num_prompt_tokens, num_output_tokens=arrival.num_output_tokens
        )
        self._end_request(request_id, Outcome.COMPLETED)
        self._execute(self.router.on_finish(request_id, usage, simulation.now_s))

    def _end_request(self, request_id: str, outcome: Outcome) -> None:
        self._held.discard(request_id)
        exchange = self._exchanges.pop(request_id)
        for replica_id, job_id in exchange.jobs.items():
            self._cancel_job(replica_id, job_id)
        self._simulation.num_open -= 1
        self._simulation.journal.record_outcome(exchange.number, outcome, self._simulation.now_s)
