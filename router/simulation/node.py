"""When does a simulated engine step, and when does it push snapshots to the gateways?

Snapshots go to every gateway as `serving.stream.server` sends them: at most one per interval, and
at once from an engine that was idle. A push is an event of its own only while a gateway listens.
Otherwise its time and content follow from the engine's steps, and it is made up when needed
(`push_due_snapshots`). Successive steps in which all sequences decode are started as one run,
which is cut when something comes in between. Neither changes a result: `Simulation(eager=True)`
does without both and gives the same run. Where no decision depends on what engines report
(`World.reports`), they send heartbeats alone.
"""

import math
import random
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import msgspec

from router import BlockUpdate, EngineInfo, EngineSnapshot
from router.fleet.block_log import BlockLog
from router.simulation.engine.sequence import Job, Progress
from router.simulation.events import Receiver, World
from router.types import HEARTBEAT_S

# How far a run of steps goes: a longer one would hardly ever end before it is cut.
_MAX_RUN_S = 0.1


class Engine(Protocol):
    """What a node simulates: `EngineModel`, or a textbook's queue."""

    info: EngineInfo
    step_num_decode_reqs: int  # in the last step
    slowness: float  # of the next steps: their time over that of an engine alone

    @property
    def blocks(self) -> BlockLog:
        """The blocks in the prefix cache."""
        ...

    @property
    def num_preemptions_total(self) -> int: ...

    @property
    def step_ends_s(self) -> list[float]:
        """The ends of the steps of the run in progress; empty between runs."""
        ...

    def add(self, job: Job) -> None: ...

    def begin_step(self, now_s: float, until_s: float) -> float | None: ...

    def cut_run(self, now_s: float) -> float | None: ...

    def advance_to(self, now_s: float) -> None: ...

    def end_step(self, now_s: float) -> Sequence[Progress]: ...

    def abort(self, job_id: str) -> None: ...

    def num_output_tokens(self, job_id: str) -> int: ...

    def snapshot(self, seq: int, last_booking: int) -> EngineSnapshot: ...


# (time of arrival, snapshot, changes of the prefix cache, who sends it)
SnapshotMessage = tuple[float, EngineSnapshot, BlockUpdate | None, "Node"]


class Channel:
    """From a node to one gateway: snapshots under way, and what that gateway has been sent."""

    __slots__ = ("block_position", "last_booking", "snapshots")

    def __init__(self) -> None:
        self.last_booking = 0  # the gateway's last one that the replica has received
        self.block_position = 0  # in the log of the prefix cache: sent up to here
        # By time of arrival.
        self.snapshots: deque[SnapshotMessage] = deque()


class Node:
    """An engine and the replica around it."""

    def __init__(
        self, simulation: "World[Node]", node_id: str, engine: Engine, rng: random.Random
    ) -> None:
        self.id = node_id
        self.engine = engine
        self.is_up = True
        self.is_draining = False
        self.channels = [Channel() for _ in simulation.gateways]
        # When the next push is due, as far as known; `push_due_snapshots` makes it.
        self.next_push_s = math.inf
        self._simulation = simulation
        self._reply_s = simulation.network.reply_s
        self._interval_s = simulation.network.snapshot_interval_s
        self._gates = simulation.network.gate and len(simulation.gateways) > 1
        self._booking_interval_s = self._interval_s
        if len(simulation.gateways) > 1:
            self._booking_interval_s = simulation.network.booking_interval_s
        self._loss = simulation.network.snapshot_loss
        self._blocks = engine.blocks
        self._reports = simulation.reports
        self._rng = rng  # which snapshots are lost
        self._gateway_of: dict[str, Receiver[Node]] = {}  # of each job in the engine
        self._new_jobs: list[Job] = []  # that no step has reported yet
        self._run_began_s = 0.0
        self._run_ends_s = math.inf  # inf: the engine has nothing to do
        self._seq = 0
        self._last_push_s = -math.inf
        self._has_unsent_change = False  # since the last push
        self._push_event_s = math.inf  # of the event for the next push

    @property
    def num_jobs(self) -> int:
        """Jobs that the replica has."""
        return len(self._gateway_of)

    @property
    def num_preemptions(self) -> int:
        """Times that the engine preempted a sequence."""
        return self.engine.num_preemptions_total

    # Messages from gateways

    def submit_job(self, submission: "tuple[Receiver[Node], int, Job, int]") -> None:
        """Add a gateway's job to the engine, or give it back as busy.

        The message holds the number of its booking, and the most that may be pending before it.
        """
        if not self.is_up:
            return
        gateway, booking, job, max_pending_tokens = submission
        self._advance_to_now()
        self.channels[gateway.number].last_booking = booking
        if self._gates and max_pending_tokens:
            snapshot = self.engine.snapshot(self._seq + 1, booking)
            if snapshot.num_pending_prefill_tokens > max_pending_tokens:
                self._seq += 1
                arrive_s = self._simulation.now_s + self._reply_s
                message = (self, job.id, snapshot)
                self._simulation.call_at(arrive_s, gateway.on_refused_as_busy, message)
                return
        self._gateway_of[job.id] = gateway
        self.engine.add(job)
        if job.block_hashes and self._reports:
            self._new_jobs.append(job)
        self._request_push(self._booking_interval_s)
        if self._run_ends_s == math.inf:
            self._begin_run()
        else:
            self._cut_run()

    def cancel_job(self, job_id: str) -> None:
        """Drop a job that its gateway has cancelled."""
        if self.is_up and self._gateway_of.pop(job_id, None) is not None:
            self._advance_to_now()
            self.engine.abort(job_id)
            if self._run_ends_s < math.inf:
                self._cut_run()
            self._request_push(self._interval_s)

    def resend_all_blocks(self, gateway: "Receiver[Node]") -> None:
        """Put all cached blocks into the next snapshot to a gateway that missed changes."""
        self.push_due_snapshots(self._simulation.now_s)
        self.channels[gateway.number].block_position = -1

    def num_output_tokens(self, job_id: str) -> int:
        """Return the tokens that a job has emitted; 0 for one that is not in the engine."""
        if job_id not in self._gateway_of:
            return 0
        self._advance_to_now()
        return self.engine.num_output_tokens(job_id)

    # Steps

    def _begin_run(self) -> None:
        simulation, engine = self._simulation, self.engine
        now_s = simulation.now_s
        until_s = now_s + _MAX_RUN_S
        if simulation.contention:
            engine.slowness = 1.0 + simulation.contention * self._share_of_others_stepping()
            until_s = -math.inf  # others may step beside the next one, or not
        elif simulation.eager:
            until_s = -math.inf
        run_s = engine.begin_step(now_s, until_s)
        self._run_began_s = now_s
        if run_s is None:
            self._schedule_end(math.inf)
            return
        if run_s > simulation.slow_step_s:
            simulation.on_slow_step()
        self._schedule_end(engine.step_ends_s[-1])

    def _cut_run(self) -> None:
        """End the run with the step in progress, for the engine's jobs have changed."""
        end_s = self.engine.cut_run(self._simulation.now_s)
        if end_s != self._run_ends_s:
            self._schedule_end(math.inf if end_s is None else end_s)

    def _schedule_end(self, end_s: float) -> None:
        self._run_ends_s = end_s
        if end_s < math.inf:
            self._simulation.call_at(end_s, self._end_run, end_s)
        self._find_next_push()

    def _end_run(self, end_s: float) -> None:
        if not self.is_up or end_s != self._run_ends_s:
            return  # down, or cut short since
        simulation, engine = self._simulation, self.engine
        now_s = simulation.now_s
        if self.next_push_s <= now_s:
            self.push_due_snapshots(now_s)
        ends_s = list(engine.step_ends_s)
        progresses = engine.end_step(now_s)
        self._record_steps(ends_s)
        if progresses or self._new_jobs:
            self._report_results(progresses)
        # One write holds the step's results and the snapshot after it.
        self._run_ends_s = math.inf
        self._request_push(self._interval_s)
        self._begin_run()
        if self.is_draining and not self._gateway_of:
            simulation.call_at(now_s + self._reply_s, self._remove_if_empty, None)

    def _report_results(self, progresses: Sequence[Progress]) -> None:
        """Send each gateway its jobs that the engine has taken in, and what came of its others."""
        messages: dict[int, tuple[list[Job], list[Progress]]] = {}
        for job in self._new_jobs:
            gateway = self._gateway_of.get(job.id)
            if gateway is not None:
                messages.setdefault(gateway.number, ([], []))[0].append(job)
        self._new_jobs.clear()
        for progress in progresses:
            gateway = self._gateway_of[progress.job_id]
            if progress.finished:
                del self._gateway_of[progress.job_id]
            messages.setdefault(gateway.number, ([], []))[1].append(progress)
        simulation = self._simulation
        arrive_s = simulation.now_s + self._reply_s
        for number, (jobs, ends) in messages.items():
            simulation.call_at(arrive_s, simulation.gateways[number].on_step, (self, jobs, ends))

    def _record_steps(self, ends_s: Sequence[float]) -> None:
        """Record in the journal the steps of the run that have ended."""
        if self.engine.step_num_decode_reqs:
            self._simulation.journal.record_steps(
                self._run_began_s, ends_s, self.engine.step_num_decode_reqs
            )

    def _share_of_others_stepping(self) -> float:
        others = [node for node in self._simulation.nodes.values() if node is not self]
        num_stepping = sum(node._run_ends_s < math.inf for node in others)
        return num_stepping / len(others) if others else 0.0

    # Pushes

    def push_due_snapshots(self, now_s: float) -> None:
        """Push the snapshots that were due by `now_s`, each of the engine's state at its time."""
        while self.next_push_s <= now_s:
            self.engine.advance_to(self.next_push_s)
            self.push_snapshot(self.next_push_s)

    def send_heartbeat(self, _: object) -> None:
        """Push a snapshot if none was pushed lately: a sign that the engine lives."""
        if self.is_up:
            simulation = self._simulation
            self._advance_to_now()
            if simulation.now_s - self._last_push_s >= HEARTBEAT_S * 0.9:
                self.push_snapshot(simulation.now_s)
            simulation.call_at(simulation.now_s + HEARTBEAT_S, self.send_heartbeat, None)

    def schedule_push(self) -> None:
        """Make the next push an event, if a gateway listens for it."""
        due_s = self.next_push_s
        if self._simulation.num_listening and due_s < self._push_event_s:
            self._push_event_s = due_s
            self._simulation.call_at(due_s, self._on_push_due, due_s)

    def _advance_to_now(self) -> None:
        """Bring the engine's state to the present, after pushing what was due before."""
        now_s = self._simulation.now_s
        if self.next_push_s <= now_s:
            self.push_due_snapshots(now_s)
        self.engine.advance_to(now_s)

    def _request_push(self, interval_s: float) -> None:
        """Push a snapshot of a change: now, or when the interval allows."""
        if not self._reports:
            return
        now_s = self._simulation.now_s
        may_s = self._last_push_s + interval_s
        if may_s <= now_s or not self._gateway_of:
            self.push_snapshot(now_s)
        else:
            self._has_unsent_change = True
            self.next_push_s = min(self.next_push_s, may_s)
            if self._simulation.num_listening:
                self.schedule_push()

    def _find_next_push(self) -> None:
        """Set when the next push is due: at the end of the run's next step, if not before.

        The last step's end is left to `_end_run`.
        """
        if self._has_unsent_change or not self._reports:
            return
        self.next_push_s = math.inf
        if self._run_ends_s == math.inf:
            return
        ends_s, last_push_s = self.engine.step_ends_s, self._last_push_s
        last = len(ends_s) - 1
        # Of the few steps of a run.
        index = 0
        while index < last and ends_s[index] <= last_push_s:
            index += 1
        if index < last:
            may_s = last_push_s + self._interval_s
            end_s = ends_s[index]
            self.next_push_s = end_s if end_s > may_s else may_s
            if self._simulation.num_listening:
                self.schedule_push()

    def push_snapshot(self, now_s: float) -> None:
        """Send every gateway a snapshot of the engine, whose state is that of `now_s`."""
        simulation = self._simulation
        self._has_unsent_change = False
        self._last_push_s = now_s
        arrive_s = now_s + self._reply_s
        self._seq += 1
        channels = self.channels
        snapshot = self.engine.snapshot(self._seq, channels[0].last_booking)
        for number, channel in enumerate(channels):
            update = self._blocks.since(channel.block_position)
            if update is not None:
                channel.block_position = update.until
            if self._loss and self._rng.random() < self._loss:
                continue
            if channel.last_booking != snapshot.last_booking:
                snapshot = msgspec.structs.replace(snapshot, last_booking=channel.last_booking)
            channel.snapshots.append((arrive_s, snapshot, update, self))
            if simulation.num_listening:
                gateway = simulation.gateways[number]
                if gateway.listens:
                    simulation.call_at(arrive_s, gateway.on_snapshot, self)
        self._find_next_push()

    def _on_push_due(self, due_s: float) -> None:
        if due_s == self._push_event_s:
            self._push_event_s = math.inf
            if self.is_up:
                self.push_due_snapshots(due_s)
                self.schedule_push()

    # The end

    def stop(self) -> None:
        """End at once; results that have not left the engine by now are lost."""
        self._advance_to_now()
        self.is_up = False
        ends_s = [end_s for end_s in self.engine.step_ends_s if end_s < self._simulation.now_s]
        self._record_steps(ends_s)

    def drain(self) -> None:
        """Accept no more jobs, complete those in the engine, then be removed."""
        self.is_draining = True
        for gateway in self._simulation.gateways:
            gateway.on_replica_draining(self)
        if not self._gateway_of:
            self._remove_if_empty(None)

    def recall(self) -> None:
        """Drain no more: accept jobs again."""
        self.is_draining = False
        for gateway in self._simulation.gateways:
            gateway.on_replica_draining(self)

    def _remove_if_empty(self, _: object) -> None:
        # Jobs under way when the draining began may have arrived since.
        if (
            self.is_up
            and self.is_draining
            and not any(gateway.has_streams(self) for gateway in self._simulation.gateways)
        ):
            self._simulation.remove_node(self)
