"""Interactive requests beside a batch that never ends, in virtual time.

The deployed router and engine model of `router.simulation`, and the deployed `Pace`, which says
how many lines of the batch may be open.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heappop

import numpy as np

from router import RequestClass, RouterSettings
from router.fleet.step_budget import ITL_TARGET_S
from router.simulation.engine.model import EngineModel
from router.simulation.engine.profile import Profile
from router.simulation.events import Network
from router.simulation.gateway import Gateway
from router.simulation.journal import NOT_ENDED, Run
from router.simulation.simulator import Simulation
from router.simulation.workload.lengths import TokenCounts
from router.simulation.workload.workload import Arrival, Workload
from serving.gateway.http.endpoints.batch.batches import PACE_S
from serving.gateway.http.endpoints.batch.pace import Pace

_TICK_S = 0.005  # in which a line that has ended is followed by the next
_NUM_LINES = 200_000  # more than any run takes


@dataclass(frozen=True)
class Scenario:
    """What one run does."""

    profile: Profile
    num_engines: int
    max_slowdown: float | None  # None: there is no batch
    max_inflight: int | None  # of the batch; with a huge slowdown: nothing but this counts
    prompts: TokenCounts  # of its lines
    replies: TokenCounts


class BesideBatch:
    """One run: the arrivals of a workload, and lines as `Pace` lets them go."""

    def __init__(self, interactive: Workload, scenario: Scenario, seed: int) -> None:
        self._num_arrivals = len(interactive)
        self._end_s = interactive.duration_s
        self._scenario = scenario
        lines = [] if scenario.max_slowdown is None else self._lines(seed)
        workload = Workload(interactive.name, (*interactive.arrivals, *lines))
        profile = scenario.profile
        self._simulation = Simulation(
            workload,
            RouterSettings(seed=seed),
            lambda rng: EngineModel(profile, rng, priority=True, itl_target_s=ITL_TARGET_S),
            scenario.num_engines,
            network=Network(submit_s=profile.path_s),
            contention=profile.contention,
            seed=seed,
        )
        gateway = self._simulation.gateways[0]
        assert isinstance(gateway, Gateway)
        self._gateway = gateway
        self._pace = Pace(scenario.max_inflight, scenario.max_slowdown or 1.0)
        self._next_line = self._num_arrivals
        self._open: dict[int, float] = {}  # lines, and when each was sent
        self._open_others: set[int] = set()
        self.limits: list[int] = []

    def _lines(self, seed: int) -> Iterable[Arrival]:
        rng = np.random.default_rng([seed, 7])
        prompts = self._scenario.prompts.draw(rng, _NUM_LINES)
        replies = self._scenario.replies.draw(rng, _NUM_LINES)
        for prompt, reply in zip(prompts, replies, strict=True):
            yield Arrival(
                offset_s=0.0,  # when it is sent shows later
                num_prompt_tokens=int(prompt),
                num_output_tokens=int(reply),
                priority_class=RequestClass.BATCH,
            )

    def run(self) -> Run:
        """Run until the last interactive request has come; return what became of each."""
        simulation = self._simulation
        arrivals = simulation.workload.arrivals
        for number in range(self._num_arrivals):
            simulation.call_at(arrivals[number].offset_s, self._arrive, number)
        if self._scenario.max_slowdown is not None:
            simulation.call_at(0.0, self._look, None)
            simulation.call_at(0.0, self._feed, None)
        while simulation.heap[0][0] < self._end_s:
            simulation.now_s, _, act, argument = heappop(simulation.heap)
            act(argument)
        return simulation.journal.to_run()

    def _arrive(self, number: int) -> None:
        self._open_others.add(number)
        self._send(number)

    def _send(self, number: int) -> None:
        self._simulation.num_open += 1
        self._gateway.on_arrival(number)

    def _look(self, _: None) -> None:
        simulation, outcome = self._simulation, self._simulation.journal.outcome
        self._gateway.deliver_snapshots()
        state = self._gateway.router.state(simulation.now_s)
        self._open_others = {n for n in self._open_others if outcome[n] == NOT_ENDED}
        self._pace.look(
            state.replicas.values(),
            num_held=state.held.num_requests,
            has_others=bool(self._open_others),
            num_lines=len(self._open),
            num_feeders=1,
            now_s=simulation.now_s,
        )
        self.limits.append(self._pace.limit)
        simulation.call_at(simulation.now_s + PACE_S, self._look, None)

    def _feed(self, _: None) -> None:
        simulation = self._simulation
        now_s, outcome, arrivals = (
            simulation.now_s,
            simulation.journal.outcome,
            simulation.workload.arrivals,
        )
        for number in [number for number in self._open if outcome[number] != NOT_ENDED]:
            line_s = simulation.journal.end_s[number] - self._open.pop(number)
            self._pace.record_line(arrivals[number].num_prompt_tokens, line_s)
        while len(self._open) < self._pace.limit:
            self._open[self._next_line] = now_s
            self._send(self._next_line)
            self._next_line += 1
        simulation.call_at(now_s + _TICK_S, self._feed, None)
