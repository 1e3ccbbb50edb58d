"""What one decision costs: `python -m benchmarks.overhead.decision`.

The deployed router alone, fed by hand: no engines, no sockets, a clock that is
counted. Timed is one call of the router, from the event to the decisions.
"""

import argparse
import gc
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

from rich.progress import track

from benchmarks.report.report import Report, percentile
from router import Dispatch, EngineInfo, EngineSnapshot, Request, Router, RouterSettings

NUM_HELD = 10_000
# Median, µs, by number of engines.
TARGETS_US = {8: 20, 64: 50, 512: 150, 2048: 500}
TARGET_BYTES = 2048
_BUDGET = 2048  # tokens per step
_NUM_KV_TOKENS = 400_000
_NUM_HASHES = 8  # text blocks of a prompt of 512 tokens


class Bench:
    """A router with a fleet in a given state, and the events that keep it there."""

    def __init__(self, num_engines: int, num_held: int, seed: int) -> None:
        self.rng = random.Random(f"decision {num_engines} {num_held} {seed}")
        self.now_s = 0.0
        # So much is held that the last comes late: looked at, but no reason to refuse it here.
        self.router = Router(
            RouterSettings(seed=seed, max_held_requests=2 * NUM_HELD, max_late_s=3600.0)
        )
        self._num_held = num_held
        self._num_requests = 0
        self._seqs = [0] * num_engines
        self._last_booking = [0] * num_engines
        info = EngineInfo(
            model="m",
            tasks=("generate",),
            max_model_len=32_768,
            max_num_seqs=256,
            max_num_batched_tokens=_BUDGET,
            max_prefill_chunk=_BUDGET // 2,
            num_kv_tokens=_NUM_KV_TOKENS,
            block_size=16,
            engine="simulated",
        )
        for engine in range(num_engines):
            self.router.on_replica_up(str(engine), info, self.now_s)

    def request(self) -> Request:
        """A new request, its sizes heavy-tailed."""
        self._num_requests += 1
        return Request(
            id=f"request-{self._num_requests:012d}",
            model="m",
            num_prompt_tokens=min(16_000, int(self.rng.lognormvariate(6.0, 1.2)) + 1),
            max_output_tokens=512,
            num_bytes=2048,
            arrival_s=self.now_s,
            prefix_hashes=tuple(self.rng.getrandbits(62) for _ in range(_NUM_HASHES)),
            prefix_block_share=1.0 / _NUM_HASHES,
        )

    def snapshot(self, engine: int, num_pending: int, num_free: int = 300_000) -> EngineSnapshot:
        """The state of an engine that decodes and has so much to prefill, so much KV free."""
        self._seqs[engine] += 1
        return EngineSnapshot(
            seq=self._seqs[engine],
            last_booking=self._last_booking[engine],
            num_running_reqs=32,
            num_free_kv_tokens=num_free,
            num_pending_prefill_tokens=num_pending,
            num_step_demand_tokens=num_pending,
            num_decoding_reqs=32,
            step_s=0.05 * self.rng.uniform(0.9, 1.1),
            step_num_prefill_tokens=1000,
            step_num_decode_reqs=32,
            num_steps_total=self._seqs[engine],
        )

    def take(self, decisions: list) -> list[Dispatch]:
        """Note the bookings; return the dispatches."""
        dispatches = [each for each in decisions if isinstance(each, Dispatch)]
        for dispatch in dispatches:
            self._last_booking[int(dispatch.replica_id)] = dispatch.booking
        return dispatches

    def timed(self, call: Callable[..., list], *args: Any) -> tuple[float, list[Dispatch]]:
        """Seconds that the call took, and what it dispatched."""
        begin_s = time.perf_counter()
        decisions = call(*args)
        return time.perf_counter() - begin_s, self.take(decisions)

    def fill(self, num_pending: int, num_free: int) -> None:
        """Bring every engine into this state, and hold as many requests as asked for."""
        for engine in range(len(self._seqs)):
            self.take(
                self.router.on_snapshot(
                    str(engine), self.snapshot(engine, num_pending, num_free), self.now_s
                )
            )
        for _ in range(self._num_held):
            self.now_s += 1e-4
            self.take(self.router.on_arrival(self.request(), self.now_s))
        held = self.router.state(self.now_s).held
        assert held.num_requests == self._num_held, held


def open_fleet(bench: Bench, num_decisions: int) -> dict[str, list[float]]:
    """Every engine has room: an arrival goes out at once."""
    bench.fill(0, 300_000)
    arrivals = []
    for _ in range(num_decisions):
        bench.now_s += 1e-3
        request = bench.request()
        took_s, dispatches = bench.timed(bench.router.on_arrival, request, bench.now_s)
        assert len(dispatches) == 1
        arrivals.append(took_s)
        bench.router.on_finish(request.id, None, bench.now_s)
    return {"arrival dispatched": arrivals}


def full_windows(bench: Bench, num_decisions: int) -> dict[str, list[float]]:
    """No engine wants more prefill: arrivals are held, a snapshot lets the next one go."""
    return _full(bench, num_decisions, closed=(3 * _BUDGET, 300_000), opened=(0, 300_000))


def full_kv(bench: Bench, num_decisions: int) -> dict[str, list[float]]:
    """KV caches are full: arrivals are held, freed blocks let some go."""
    return _full(bench, num_decisions, closed=(0, 150), opened=(0, 40_000))


def _full(
    bench: Bench, num_decisions: int, closed: tuple[int, int], opened: tuple[int, int]
) -> dict[str, list[float]]:
    bench.fill(*closed)
    arrivals, snapshots = [], []
    num_engines = len(bench._seqs)
    for _ in range(num_decisions):
        bench.now_s += 1e-3
        engine = bench.rng.randrange(num_engines)
        state = bench.snapshot(engine, *opened)
        took_s, dispatches = bench.timed(bench.router.on_snapshot, str(engine), state, bench.now_s)
        if dispatches:
            snapshots.append(took_s / len(dispatches))
        state = bench.snapshot(engine, *closed)
        bench.take(bench.router.on_snapshot(str(engine), state, bench.now_s))
        for dispatch in dispatches:  # as many come as went, and those that went are over
            took_s, placed = bench.timed(bench.router.on_arrival, bench.request(), bench.now_s)
            if not placed:
                arrivals.append(took_s)
            bench.take(bench.router.on_finish(dispatch.request_id, None, bench.now_s))
    return {"arrival held": arrivals, "snapshot, per dispatch": snapshots}


SCENES = {"open fleet": open_fleet, "full windows": full_windows, "full KV": full_kv}


def bytes_per_held(seed: int) -> float:
    """Bytes that one held request takes in the router, its body aside."""
    bench = Bench(8, 0, seed)
    bench.fill(3 * _BUDGET, 300_000)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(NUM_HELD):
        bench.router.on_arrival(bench.request(), bench.now_s)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (after - before) / NUM_HELD


def run(sizes: Sequence[int], num_decisions: int, seed: int) -> Report:
    """Time every scene at every size of the fleet; return the report."""
    config = {"engines": list(sizes), "decisions": num_decisions, "held": NUM_HELD}
    report = Report("decision", "measured", seed, config)
    worst_us: dict[int, float] = dict.fromkeys(sizes, 0.0)
    scenes = [(name, num_engines) for name in SCENES for num_engines in sizes]
    for name, num_engines in track(scenes, description="decisions"):
        num_held = 0 if name == "open fleet" else NUM_HELD
        bench = Bench(num_engines, num_held, seed)
        gc.collect()
        gc.freeze()
        for event, times_s in SCENES[name](bench, num_decisions).items():
            median_us = percentile(times_s, 50) * 1e6
            report.row(
                "Time of one decision, µs",
                scene=name,
                event=event,
                engines=num_engines,
                held=num_held,
                p50=median_us,
                p99=percentile(times_s, 99) * 1e6,
                decisions=len(times_s),
            )
            worst_us[num_engines] = max(worst_us[num_engines], median_us)
        gc.unfreeze()
    for num_engines, median_us in worst_us.items():
        if (target_us := TARGETS_US.get(num_engines)) is not None:
            report.target(
                f"median decision at {num_engines} engines, worst scene, µs",
                median_us,
                f"<= {target_us}",
            )
    report.target(
        "bytes per held request beside its body", bytes_per_held(seed), f"<= {TARGET_BYTES}"
    )
    report.note("Python objects as tracemalloc counts them; each request bears 8 prefix hashes.")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engines", type=int, nargs="+", default=list(TARGETS_US))
    parser.add_argument("--decisions", type=int, default=1000, help="per scene and fleet")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    run(options.engines, options.decisions, options.seed).finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
