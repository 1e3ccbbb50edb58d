"""The deployed router in virtual time: an event heap around `router.core.Router`.

What `serving` is in real time: gateways that carry out decisions as
`serving/driver.py` does, engines whose replicas push snapshots as
`serving/port.py` does, and a network between them. Nothing of the router's logic
is here. Equal seeds give equal runs, event by event.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, Protocol

import msgspec

from benchmarks.engine_model import Job, Progress
from benchmarks.journal import Journal, Run
from benchmarks.provider_model import ProviderModel
from benchmarks.workload import Arrival, Workload
from router.budget import RateReport
from router.core import Router
from router.fallback import FallbackSettings
from router.policies.prefix_index import BLOCK_TOKENS
from router.settings import RouterSettings
from router.types import (
    BlockUpdate,
    Decision,
    Dispatch,
    EngineInfo,
    EngineSnapshot,
    Evacuate,
    Fail,
    Fallback,
    Outcome,
    Reject,
    RejectReason,
    Request,
    Usage,
)
from serving.block_log import BlockLog

# As in serving/port.py, serving/driver.py and serving/intake.py, which import what a
# simulation must not need (asyncio, Ray, FastAPI).
_SNAPSHOT_INTERVAL_S = 0.010
_HEARTBEAT_S = 0.5
_MAX_PREFIX_BLOCKS = 256
_BYTES_PER_TOKEN = 4

Act = Callable[[Any], None]


class Engine(Protocol):
    """What is simulated behind a replica: `EngineModel`, or a queue from a textbook."""

    info: EngineInfo
    step_num_decode_reqs: int  # in the last step
    num_preemptions_total: int
    slowness: float  # of steps begun from now on, over those of an engine alone
    blocks: BlockLog

    def add(self, job: Job) -> None: ...

    def begin_step(self, now_s: float) -> float | None: ...

    def cut(self, now_s: float) -> float | None: ...

    def end_step(self, now_s: float) -> Sequence[Progress]: ...

    def abort(self, job_id: str) -> None: ...

    def num_output_tokens(self, job_id: str) -> int: ...

    def snapshot(self, seq: int, last_booking: int) -> EngineSnapshot: ...


@dataclass(frozen=True)
class Network:
    """Between gateways and engines."""

    # Measured on loopback: 0.5 ms at the median.
    submit_s: float = 0.0005  # from a decision to the engine's queue
    reply_s: float = 0.0005  # from the end of a step to the gateway
    snapshot_interval_s: float = _SNAPSHOT_INTERVAL_S
    snapshot_loss: float = 0.0  # share of snapshots that never arrive


@dataclass(frozen=True)
class Failure:
    """An engine dies with all it has, and is replaced."""

    engine: int
    at_s: float
    down_s: float  # until its replacement is ready


class Scaler(Protocol):
    """Says how many engines there should be; called every `interval_s`."""

    interval_s: float

    def num_wanted(self, simulation: "Simulation") -> int: ...


class Simulation:
    """One run of a workload over engines and gateways."""

    def __init__(
        self,
        workload: Workload,
        settings: RouterSettings,
        make_engine: Callable[[random.Random], Engine],
        num_engines: int,
        *,
        num_gateways: int = 1,
        network: Network | None = None,
        failures: Sequence[Failure] = (),
        scaler: Scaler | None = None,
        segment_tokens: int = 16,
        contention: float = 0.0,
        start_s: float = 0.0,
        seed: int = 0,
        priority: Callable[[Arrival], int] | None = None,
        providers: Sequence[ProviderModel] = (),
        fallback: FallbackSettings | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """`segment_tokens`: what one hash of a job covers, as the engines expect it.
        `contention`: how much longer a step takes, as a share of it, while all other engines
        step too (engines that share a machine's memory; GPUs do not).
        `start_s`: how long an engine that `scaler` asks for takes to be ready.

        `priority` replaces what the gateway would tell the engine (a reference that knows
        more than a gateway can). `on_progress` is called with the number of arrivals so far.
        """
        self.workload = workload
        self.network = network if network is not None else Network()
        self.now_s = 0.0
        self.journal = Journal(workload)
        self.nodes: dict[str, Node] = {}
        self.num_open = 0
        self._heap: list[tuple[float, int, Act, Any]] = []
        self._num_events = 0
        self._num_arrived = 0
        self._num_nodes = 0
        self._rng = random.Random(f"simulation {seed}")
        self._make_engine = make_engine
        self._scaler = scaler
        self._start_s = start_s
        self.segment_tokens = segment_tokens
        self.contention = contention
        self._priority = priority
        self._on_progress = on_progress
        self.providers = {provider.settings.name: provider for provider in providers}
        self.gateways = [
            Gateway(self, settings.model_copy(update={"seed": settings.seed + number}), number)
            for number in range(num_gateways)
        ]
        for gateway in self.gateways if providers else ():
            settings_of = [provider.settings for provider in providers]
            gateway.router.use_providers(settings_of, fallback or FallbackSettings(), 0.0)
        self._gateway_of = [self._rng.randrange(num_gateways) for _ in workload.arrivals]
        for _ in range(num_engines):
            self._start_node(None)
        for failure in failures:
            self.at(failure.at_s, self._fail, failure)
        if scaler is not None:
            self.at(scaler.interval_s, self._scale, scaler)

    def run(self) -> Run:
        """Return what became of every request."""
        self.at(self.workload.arrivals[0].offset_s, self._arrive, 0)
        heap, num_requests = self._heap, len(self.workload)
        while self._num_arrived < num_requests or self.num_open:
            self.now_s, _, act, argument = heappop(heap)
            act(argument)
        self.journal.num_events = self._num_events
        self.journal.num_preemptions += sum(node.num_preemptions for node in self.nodes.values())
        return self.journal.closed()

    def at(self, time_s: float, act: Act, argument: Any) -> None:
        """Have `act(argument)` called at this time; equal times in order of asking."""
        self._num_events += 1
        heappush(self._heap, (time_s, self._num_events, act, argument))

    @property
    def working_nodes(self) -> list["Node"]:
        """Engines that take new work."""
        return [node for node in self.nodes.values() if not node.is_draining]

    def priority_of(self, gateway: "Gateway", request: Request, arrival: Arrival) -> int:
        """What vLLM is told: lower is first."""
        if self._priority is not None:
            return self._priority(arrival)
        promised_s = gateway.router.engine_priority_s(request)
        return 0 if promised_s is None else round(promised_s * 1000)

    def _arrive(self, number: int) -> None:
        self._num_arrived = number + 1
        self.num_open += 1
        if self._num_arrived < len(self.workload):
            next_s = self.workload.arrivals[self._num_arrived].offset_s
            self.at(next_s, self._arrive, self._num_arrived)
        if self._on_progress is not None and not number % 1000:
            self._on_progress(number)
        self.gateways[self._gateway_of[number]].arrive(number)

    def _start_node(self, _: Any) -> None:
        node = Node(self, f"engine-{self._num_nodes:04}", self._make_engine(self._rng))
        self._num_nodes += 1
        self.nodes[node.id] = node
        for gateway in self.gateways:
            gateway.on_replica_up(node)
        node.push()
        self.at(self.now_s + _HEARTBEAT_S, node.beat, None)

    def _fail(self, failure: Failure) -> None:
        working = self.working_nodes
        if failure.engine < len(working):
            self.take_down(working[failure.engine])
        self.at(self.now_s + failure.down_s, self._start_node, None)

    def _scale(self, scaler: Scaler) -> None:
        self.at(self.now_s + scaler.interval_s, self._scale, scaler)
        working = self.working_nodes
        num_starting = sum(act == self._start_node for _, _, act, _ in self._heap)
        num_missing = scaler.num_wanted(self) - len(working) - num_starting
        for _ in range(num_missing):
            self.at(self.now_s + self._start_s, self._start_node, None)
        for node in working[num_missing:] if num_missing < 0 else ():
            node.drain()

    def take_down(self, node: "Node") -> None:
        """End an engine at once; what it had is lost."""
        del self.nodes[node.id]
        node.is_up = False
        self.journal.num_preemptions += node.num_preemptions
        for gateway in self.gateways:
            gateway.on_replica_down(node)


class Node:
    """An engine and the replica around it."""

    def __init__(self, simulation: Simulation, node_id: str, engine: Engine) -> None:
        self.id = node_id
        self.engine = engine
        self.is_up = True
        self.is_draining = False
        self._simulation = simulation
        self._gateway_of: dict[str, Gateway] = {}  # of each job in the engine
        self._last_booking = [0] * len(simulation.gateways)
        self._block_position = [0] * len(simulation.gateways)  # what each knows of the cache
        self._new_jobs: list[Job] = []  # of which no step has told yet
        self._is_stepping = False
        self._step_began_s = 0.0
        self._step_ends_s = 0.0
        self._seq = 0
        self._last_push_s = float("-inf")
        self._has_timer = False

    @property
    def num_jobs(self) -> int:
        """Requests that the replica has."""
        return len(self._gateway_of)

    @property
    def num_preemptions(self) -> int:
        """Sequences that the engine had to begin again."""
        return self.engine.num_preemptions_total

    def submit(self, submission: tuple["Gateway", int, Job]) -> None:
        """A request has come over the network."""
        if not self.is_up:
            return
        gateway, booking, job = submission
        self._gateway_of[job.id] = gateway
        self._last_booking[gateway.number] = booking
        self.engine.add(job)
        if job.block_hashes:
            self._new_jobs.append(job)
        if self._is_due():
            self.push()
        if not self._is_stepping:
            self._begin()
        elif (end_s := self.engine.cut(self._simulation.now_s)) != self._step_ends_s:
            self._schedule_end(end_s)

    def cancel(self, job_id: str) -> None:
        """A gateway wants a job no more."""
        if self.is_up and self._gateway_of.pop(job_id, None) is not None:
            self.engine.abort(job_id)
            if self._is_due():
                self.push()

    def num_output_tokens(self, job_id: str) -> int:
        """Tokens that a job has brought forth; 0 of one that is not here, or not yet."""
        return self.engine.num_output_tokens(job_id) if job_id in self._gateway_of else 0

    def _begin(self) -> None:
        simulation = self._simulation
        now_s = simulation.now_s
        if simulation.contention:
            others = [node for node in simulation.nodes.values() if node is not self]
            num_stepping = sum(node._is_stepping for node in others)
            share = num_stepping / len(others) if others else 0.0
            self.engine.slowness = 1.0 + simulation.contention * share
        step_s = self.engine.begin_step(now_s)
        self._is_stepping = step_s is not None
        if step_s is not None:
            self._step_began_s = now_s
            self._schedule_end(now_s + step_s)

    def _schedule_end(self, end_s: float) -> None:
        self._step_ends_s = end_s
        self._simulation.at(end_s, self._end, end_s)

    def _end(self, end_s: float) -> None:
        if not self.is_up or end_s != self._step_ends_s:
            return  # lost, or cut short since
        simulation = self._simulation
        journal, now_s = simulation.journal, simulation.now_s
        engine = self.engine
        news: dict[Gateway, list[Progress]] = {}
        for progress in engine.end_step(now_s):
            gateway = self._gateway_of[progress.job_id]
            if progress.finished:
                del self._gateway_of[progress.job_id]
            news.setdefault(gateway, []).append(progress)
        if engine.step_num_decode_reqs:
            journal.step_gaps_s.append(now_s - self._step_began_s)
            journal.step_gap_counts.append(engine.step_num_decode_reqs)
        arrive_s = now_s + simulation.network.reply_s
        for job in self._new_jobs:
            if (gateway := self._gateway_of.get(job.id)) is not None:
                simulation.at(arrive_s, gateway.on_prompt, (self, job))
        self._new_jobs.clear()
        for gateway, progresses in news.items():
            simulation.at(arrive_s, gateway.receive, (self, progresses))
        # One write holds what the step brought and the snapshot after it.
        if self._is_due():
            self.push()
        self._begin()
        if self.is_draining and not self._gateway_of:
            simulation.at(arrive_s, self._leave, None)

    def _is_due(self) -> bool:
        """Whether to push now; else a timer is set."""
        simulation = self._simulation
        due_s = self._last_push_s + simulation.network.snapshot_interval_s
        if due_s <= simulation.now_s or not self._gateway_of:
            return True
        if not self._has_timer:
            self._has_timer = True
            simulation.at(due_s, self._push_late, None)
        return False

    def _push_late(self, _: Any) -> None:
        if self._has_timer and self.is_up:
            self.push()

    def push(self) -> None:
        """Send every gateway the engine's state."""
        simulation, network = self._simulation, self._simulation.network
        self._has_timer = False
        self._last_push_s = simulation.now_s
        arrive_s = simulation.now_s + network.reply_s
        self._seq += 1
        snapshot = self.engine.snapshot(self._seq, self._last_booking[0])
        for gateway in simulation.gateways:
            position = self._block_position[gateway.number]
            if (update := self.engine.blocks.since(position)) is not None:
                self._block_position[gateway.number] = update.until
            if network.snapshot_loss and simulation._rng.random() < network.snapshot_loss:
                continue
            if update is not None:
                simulation.at(arrive_s, gateway.on_blocks, (self, update))
            if (booking := self._last_booking[gateway.number]) != snapshot.last_booking:
                snapshot = msgspec.structs.replace(snapshot, last_booking=booking)
            simulation.at(arrive_s, gateway.on_snapshot, (self, snapshot))

    def resync(self, gateway: "Gateway") -> None:
        """A gateway has missed what changed in the cache: tell it everything, next time."""
        self._block_position[gateway.number] = -1

    def beat(self, _: Any) -> None:
        """Show that the engine lives, where nothing else has lately."""
        if self.is_up:
            simulation = self._simulation
            if simulation.now_s - self._last_push_s >= _HEARTBEAT_S * 0.9:
                self.push()
            simulation.at(simulation.now_s + _HEARTBEAT_S, self.beat, None)

    def drain(self) -> None:
        """Take no more, end what is there, leave."""
        self.is_draining = True
        for gateway in self._simulation.gateways:
            gateway.on_replica_draining(self)
        if not self._gateway_of:
            self._leave(None)

    def _leave(self, _: Any) -> None:
        # What was on its way when the draining began may have come since.
        if self.is_up and not any(
            gateway.has_streams(self) for gateway in self._simulation.gateways
        ):
            self._simulation.take_down(self)


class Gateway:
    """A router and the shell around it, as `serving/driver.py` is one."""

    def __init__(self, simulation: Simulation, settings: RouterSettings, number: int) -> None:
        self.number = number
        self.router = Router(settings)
        self._simulation = simulation
        self._max_hold_s = settings.max_hold_s
        self._model = ""
        self._calls: dict[str, Call] = {}  # open, by request
        self._streams: dict[str, dict[str, Call]] = {}  # by engine and job
        self._wake_s: float | None = None

    def has_streams(self, node: Node) -> bool:
        """Whether a request of ours is on the engine, or on its way there or back."""
        return bool(self._streams.get(node.id))

    # Clients

    def arrive(self, number: int) -> None:
        """A request comes in."""
        simulation = self._simulation
        now_s = simulation.now_s
        arrival = simulation.workload.arrivals[number]
        hashes: tuple[int, ...] = ()
        if self.router.wants_prefix:
            hashes = arrival.block_hashes(BLOCK_TOKENS)[:_MAX_PREFIX_BLOCKS]
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
            prefix_block_share=BLOCK_TOKENS / arrival.num_prompt_tokens,
        )
        self._calls[request.id] = Call(number, request)
        self._execute(self.router.on_arrival(request, now_s))

    # Engines

    def on_replica_up(self, node: Node) -> None:
        self._model = node.engine.info.model
        self._streams[node.id] = {}
        info = msgspec.structs.replace(node.engine.info, heartbeat_s=_HEARTBEAT_S)
        self._execute(self.router.on_replica_up(node.id, info, self._simulation.now_s))

    def on_replica_draining(self, node: Node) -> None:
        self._execute(self.router.on_replica_draining(node.id, self._simulation.now_s))

    def on_snapshot(self, news: tuple[Node, EngineSnapshot]) -> None:
        node, snapshot = news
        if node.is_up:
            self._execute(self.router.on_snapshot(node.id, snapshot, self._simulation.now_s))

    def on_blocks(self, news: tuple[Node, BlockUpdate]) -> None:
        node, update = news
        if node.is_up and not self.router.on_blocks(node.id, update):
            simulation = self._simulation
            simulation.at(simulation.now_s + simulation.network.submit_s, node.resync, self)

    def on_prompt(self, news: tuple[Node, Job]) -> None:
        """An engine tells what a prompt consists of."""
        node, job = news
        if node.is_up and (call := self._streams[node.id].get(job.id)) is not None:
            segment_tokens = self._simulation.segment_tokens
            hashes = job.block_hashes[: job.num_prompt_tokens // segment_tokens]
            self.router.on_prompt(call.request.id, job.num_prompt_tokens, list(hashes))

    def receive(self, news: tuple[Node, list[Progress]]) -> None:
        """First tokens and ends come in."""
        node, progresses = news
        if not node.is_up:
            return
        simulation = self._simulation
        now_s, journal = simulation.now_s, simulation.journal
        for progress in progresses:
            call = self._streams[node.id].get(progress.job_id)
            if call is None:
                continue  # taken off that engine while this was under way
            request_id = call.request.id
            if call.awaits_first_token:
                call.awaits_first_token = False
                if not call.has_begun:
                    call.has_begun = True
                    journal.first_s[call.number] = now_s
                self._execute(self.router.on_first_token(request_id, now_s))
            if progress.finished:
                arrival = simulation.workload.arrivals[call.number]
                usage = Usage(
                    num_prompt_tokens=arrival.num_prompt_tokens,
                    num_cached_tokens=progress.num_cached_tokens,
                    num_output_tokens=arrival.num_output_tokens,
                )
                journal.num_cached_tokens[call.number] = progress.num_cached_tokens
                del self._streams[node.id][progress.job_id]
                self._close(request_id, Outcome.COMPLETED)
                self._execute(self.router.on_finish(request_id, usage, now_s))

    def on_replica_down(self, node: Node) -> None:
        """First close the door, then find the requests another place."""
        lost = self._streams.pop(node.id, {})
        self._execute(self.router.on_replica_down(node.id, self._simulation.now_s))
        for job_id, call in lost.items():
            self._fail_attempt(node, job_id, call)

    def _evacuate(self, node: Node) -> None:
        simulation = self._simulation
        left, self._streams[node.id] = self._streams[node.id], {}
        for job_id, call in left.items():
            simulation.at(simulation.now_s + simulation.network.submit_s, node.cancel, job_id)
            self._fail_attempt(node, job_id, call)

    def _fail_attempt(self, node: Node, job_id: str, call: "Call") -> None:
        """The engine did not carry it through: another goes on where it stopped."""
        num_output_tokens = node.num_output_tokens(job_id)
        call.num_output_tokens += num_output_tokens
        call.awaits_first_token = True
        call.num_attempts += 1
        self._execute(
            self.router.on_attempt_failed(
                call.request.id,
                None,
                self._simulation.now_s,
                has_begun=call.has_begun,
                num_output_tokens=num_output_tokens,
            )
        )

    # Decisions

    def _execute(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            if isinstance(decision, Dispatch):
                self._dispatch(decision)
            elif isinstance(decision, Fallback):
                self._fall_back(decision)
            elif isinstance(decision, Reject):
                expired = decision.reason is RejectReason.EXPIRED
                self._close(decision.request_id, Outcome.EXPIRED if expired else Outcome.REJECTED)
            elif isinstance(decision, Fail):
                self._close(decision.request_id, Outcome.FAILED)
            elif isinstance(decision, Evacuate):
                self._evacuate(self._simulation.nodes[decision.replica_id])
        wake_s = self.router.next_wake_s()
        if wake_s != self._wake_s:
            self._wake_s = wake_s
            if wake_s is not None:
                simulation = self._simulation
                simulation.at(max(wake_s, simulation.now_s), self._tick, wake_s)

    def _tick(self, wake_s: float) -> None:
        if wake_s == self._wake_s:
            self._wake_s = None
            self._execute(self.router.on_tick(self._simulation.now_s))

    def _dispatch(self, decision: Dispatch) -> None:
        simulation = self._simulation
        call = self._calls[decision.request_id]
        node = simulation.nodes[decision.replica_id]
        arrival = simulation.workload.arrivals[call.number]
        if not call.has_begun:
            simulation.journal.placed_s[call.number] = simulation.now_s
        job = Job(
            # An engine may get the same request twice: each time is a job of its own.
            id=f"{call.number}.{call.num_attempts}",
            num_prompt_tokens=arrival.num_prompt_tokens + call.num_output_tokens,
            num_output_tokens=max(1, arrival.num_output_tokens - call.num_output_tokens),
            priority=simulation.priority_of(self, call.request, arrival),
            block_hashes=arrival.block_hashes(simulation.segment_tokens, with_reply=True),
            num_expected_cached_tokens=decision.num_cached_tokens,
        )
        self._streams[node.id][job.id] = call
        arrive_s = simulation.now_s + simulation.network.submit_s
        simulation.at(arrive_s, node.submit, (self, decision.booking, job))

    def _fall_back(self, decision: Fallback) -> None:
        simulation = self._simulation
        call = self._calls[decision.request_id]
        simulation.journal.placed_s[call.number] = simulation.now_s
        arrive_s = simulation.now_s + simulation.network.submit_s
        simulation.at(arrive_s, self._reach, (decision, call))

    def _reach(self, news: tuple[Fallback, "Call"]) -> None:
        """A request has come to a provider; what it says comes back when it answers."""
        decision, call = news
        simulation = self._simulation
        arrival = simulation.workload.arrivals[call.number]
        times_s, report = simulation.providers[decision.provider].take(
            arrival.num_prompt_tokens, arrival.num_output_tokens, simulation.now_s
        )
        if times_s is None:
            refused_s = simulation.now_s + simulation.network.reply_s
            simulation.at(refused_s, self._on_refused, (call.request.id, report))
            return
        first_s = simulation.now_s + times_s[0]
        simulation.at(first_s, self._on_provider_first, (call, report))
        simulation.at(first_s + times_s[1], self._on_provider_end, call)

    def _on_refused(self, news: tuple[str, RateReport]) -> None:
        request_id, report = news
        now_s = self._simulation.now_s
        self._execute(self.router.on_provider_refused(request_id, report, now_s))

    def _on_provider_first(self, news: tuple["Call", RateReport]) -> None:
        call, report = news
        now_s, request_id = self._simulation.now_s, call.request.id
        self._simulation.journal.first_s[call.number] = now_s
        self._execute(self.router.on_provider_answer(request_id, report, now_s))
        self._execute(self.router.on_first_token(request_id, now_s))

    def _on_provider_end(self, call: "Call") -> None:
        simulation, request_id = self._simulation, call.request.id
        arrival = simulation.workload.arrivals[call.number]
        usage = Usage(
            num_prompt_tokens=arrival.num_prompt_tokens, num_output_tokens=arrival.num_output_tokens
        )
        self._close(request_id, Outcome.COMPLETED)
        self._execute(self.router.on_finish(request_id, usage, simulation.now_s))

    def _close(self, request_id: str, outcome: Outcome) -> None:
        call = self._calls.pop(request_id)
        self._simulation.num_open -= 1
        self._simulation.journal.end(call.number, outcome, self._simulation.now_s)


@dataclass(slots=True)
class Call:
    """A request that is open at a gateway."""

    number: int  # of the arrival
    request: Request
    num_output_tokens: int = 0  # that engines have sent which then failed
    num_attempts: int = 0  # that have failed
    has_begun: bool = False  # its first token has come
    awaits_first_token: bool = True  # from the engine that has it
