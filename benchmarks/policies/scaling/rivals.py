"""What else decides how many engines there are: as others do it, and with all knowledge.

Each is given the best of what it could have: load as our gateway sees it, which most have to
scrape, and our measured rates where it needs any.
"""

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from router.scaling.capacity import engines_for, load_of
from router.scaling.demand import EngineRates
from router.scaling.simulated import demand_of
from router.simulation.events import World
from router.simulation.node import Node
from router.simulation.workload.workload import Workload

_CONTEXT_TOKENS = 2_000.0  # a sequence's, about; KV room limits none of the workloads here


def _num_working(world: World[Node]) -> int:
    return sum(not node.is_draining for node in world.nodes.values())


class RayDefault:
    """Ray Serve's own policy: ongoing requests over a target, with its delays (2.60).

    `ray.serve.autoscaling_policy`, `_core_replica_queue_length_policy` and `_apply_delay_logic`;
    what `AutoscalingConfig` has by default but for the target, whose 2 no LLM engine is run with.
    """

    interval_s = 1.0
    chooses = False
    _UP_S, _DOWN_S, _LOOK_BACK_S = 30.0, 600.0, 30.0

    def __init__(self, target: float, max_engines: int) -> None:
        self._target, self._max = target, max_engines
        self._ongoing: deque[int] = deque(maxlen=round(self._LOOK_BACK_S / self.interval_s))
        self._wanted = 0
        self._since: tuple[int, float] | None = None  # direction, and since when

    def num_wanted(self, world: World[Node], num_starting: int) -> int:
        self._wanted = self._wanted or _num_working(world)
        self._ongoing.append(demand_of(world).num_open_requests)
        mean = sum(self._ongoing) / len(self._ongoing)
        desired = min(self._max, max(1, math.ceil(mean / self._target)))
        direction = (desired > self._wanted) - (desired < self._wanted)
        if not direction:
            self._since = None
        elif self._since is None or self._since[0] != direction:
            self._since = (direction, world.now_s)
        elif world.now_s - self._since[1] >= (self._UP_S if direction > 0 else self._DOWN_S):
            self._wanted, self._since = desired, None
        return self._wanted


class Reactive:
    """KV usage and queue length, by the rule of Kubernetes' Horizontal Pod Autoscaler.

    Every 15 s, tolerance 0.1, the most of the last 300 s on the way down: HPA's defaults. Metrics
    as those who run vLLM with KEDA or an HPA take them: mean KV usage, requests that wait per
    engine, in the engine or before it.
    """

    interval_s = 15.0
    chooses = False
    _WAITING, _TOLERANCE, _STABLE_S = 5.0, 0.1, 300.0

    def __init__(self, kv_usage: float, max_engines: int) -> None:
        self._kv_usage, self._max = kv_usage, max_engines
        self._recent: deque[tuple[float, int]] = deque()

    def num_wanted(self, world: World[Node], num_starting: int) -> int:
        working = max(1, _num_working(world))
        usages, num_waiting = [], 0
        for gateway in world.gateways:
            state = gateway.router.state(world.now_s)
            num_waiting += state.held.num_requests
            for replica in state.replicas.values():
                if replica.snapshot is not None and not replica.is_draining:
                    usages.append(replica.snapshot.kv_cache_usage)
                    num_waiting += replica.snapshot.num_waiting_reqs
        kv_usage = sum(usages) / len(usages) if usages else 0.0
        ratio = max(kv_usage / self._kv_usage, num_waiting / working / self._WAITING)
        current = working + num_starting
        # HPA counts pods that are not ready as if they used nothing on the way up.
        desired = math.ceil(working * ratio)
        if abs(ratio - 1.0) <= self._TOLERANCE or (ratio > 1.0 and desired < current):
            desired = current
        desired = min(self._max, max(1, desired), max(current + 4, 2 * current))
        self._recent.append((world.now_s, desired))
        while self._recent[0][0] < world.now_s - self._STABLE_S:
            self._recent.popleft()
        return max(number for _, number in self._recent)


class TokenRate:
    """Tokens that come per second over what an engine can do: TokenScale's token velocity.

    Prefill and decode apart, at the rates that engines were measured with, without a forecast
    (Lai et al., TokenScale, arXiv 2512.03416). An engine is kept as long as ours is.
    """

    interval_s = 1.0
    chooses = False
    _WINDOW_S = 10.0

    def __init__(self, max_load: float, max_engines: int, keep_s: float) -> None:
        self._max_load, self._max, self._keep_s = max_load, max_engines, keep_s
        self._seen: deque[tuple[float, float, float]] = deque()
        self._recent: deque[tuple[float, int]] = deque()

    def num_wanted(self, world: World[Node], num_starting: int) -> int:
        demand, now_s = demand_of(world), world.now_s
        prefill, decode = demand.num_prefill_tokens_total, demand.num_decode_tokens_total
        self._seen.append((now_s, prefill, decode))
        while self._seen[0][0] < now_s - self._WINDOW_S:
            self._seen.popleft()
        wanted = 1
        span_s = now_s - self._seen[0][0]
        if demand.rates is not None and span_s > 0.0:
            rate, rate_out = (
                (now - then) / span_s
                for now, then in ((prefill, self._seen[0][1]), (decode, self._seen[0][2]))
            )
            load = load_of(demand.rates, rate, rate_out)
            need = engines_for(demand.rates, load, rate_out, _CONTEXT_TOKENS, self._max_load)
            wanted = max(1, math.ceil(need))
        self._recent.append((now_s, min(wanted, self._max)))
        while self._recent[0][0] < now_s - self._keep_s:
            self._recent.popleft()
        return max(number for _, number in self._recent)


class Clairvoyant:
    """Knows all that will come, lengths included: engines are ready when work comes.

    And stay where they will be needed again before a new one could be ready.
    """

    interval_s = 1.0
    chooses = True
    _BIN_S = 5.0

    def __init__(
        self,
        workload: Workload,
        rates: EngineRates,
        start_s: float,
        max_load: float,
        max_engines: int,
    ) -> None:
        needs = needs_of(workload, rates, self._BIN_S, max_load)
        windows = np.maximum(needs, np.append(needs[1:], needs[-1]))
        smooth = (needs + np.append(needs[1:], needs[-1])) / 2.0
        self._needs = np.minimum(windows, np.maximum(smooth, np.roll(smooth, 1)))
        self._ahead = math.ceil(start_s / self._BIN_S) + 2
        self._max = max_engines

    def num_wanted(self, world: World[Node], num_starting: int) -> int:
        number = int(world.now_s / self._BIN_S)
        coming = self._needs[number : number + self._ahead]
        return min(self._max, max(1, math.ceil(coming.max()) if len(coming) else 1))


class Fixed:
    """As many engines all the time."""

    interval_s = 5.0
    chooses = False

    def __init__(self, num_engines: int) -> None:
        self._num_engines = num_engines

    def num_wanted(self, world: World[Node], num_starting: int) -> int:
        return self._num_engines


def needs_of(workload: Workload, rates: EngineRates, bin_s: float, max_load: float) -> np.ndarray:
    """Return how many engines each successive bin of time needs, [num_bins]; fractions."""
    arrivals: Sequence = workload.arrivals
    bins = np.array([int(each.offset_s / bin_s) for each in arrivals])
    prompts = np.array([each.num_prompt_tokens for each in arrivals])
    outputs = np.array([each.num_output_tokens for each in arrivals])
    loads = rates.token_s * np.bincount(bins, prompts) + rates.decode_s * np.bincount(bins, outputs)
    needs: np.ndarray = loads / bin_s / max_load
    return needs
