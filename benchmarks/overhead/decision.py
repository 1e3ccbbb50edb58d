"""What does one routing decision cost?

    python -m benchmarks.overhead.decision

The deployed router alone, without engines and sockets and with a virtual clock. What is timed is
one call of the router, from the event to the decisions. Each form of the core, plain Python and
compiled, runs in processes of its own, in turn for each scene, so that both meet the same machine.
Of several such runs the quietest counts, because other programs only make it slower.
"""

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

from rich.progress import track

from benchmarks.report.report import Report, percentile
from router import (
    BlockUpdate,
    Dispatch,
    EngineInfo,
    EngineSnapshot,
    Request,
    Router,
    RouterSettings,
)
from serving.core_form import VARIABLE, form

NUM_HELD = 10_000
# Median of the worst row, µs, by number of engines; the router in the form that is served.
TARGETS_US = {8: 20, 64: 30, 512: 60, 2048: 120}
NOTHING = "snapshot that changes nothing"
TARGET_NOTHING_US = 8
TARGET_BYTES = 2048
_STEP_TOKENS = 2048  # the token budget of one step
_NUM_KV_TOKENS = 400_000
_NUM_HASHES = 8  # text blocks of a prompt of 512 tokens
_PREFIX_TOKENS, _BLOCK_TOKENS = 512, 16
_NUM_PER_HOLDER = 8  # engines, of which one holds the prefix that is known


class RouterHarness:
    """A router with a fleet in a given state, and the events that keep it in that state."""

    def __init__(self, num_engines: int, num_held: int, seed: int) -> None:
        self.rng = random.Random(f"decision {num_engines} {num_held} {seed}")
        self.now_s = 0.0
        # So many requests are held that the last ones are late. Here that must not refuse them.
        self.router = Router(
            RouterSettings(seed=seed, max_held_requests=2 * num_held, max_late_s=3600.0)
        )
        self.num_engines = num_engines
        self._num_held = num_held
        self._num_requests = 0
        self._seqs = [0] * num_engines
        self._last_booking = [0] * num_engines
        info = EngineInfo(
            model="m",
            tasks=("generate",),
            max_model_len=32_768,
            max_num_seqs=256,
            max_num_batched_tokens=_STEP_TOKENS,
            max_prefill_chunk=_STEP_TOKENS // 2,
            num_kv_tokens=_NUM_KV_TOKENS,
            block_size=_BLOCK_TOKENS,
            engine="simulated",
        )
        for engine in range(num_engines):
            self.router.on_replica_up(str(engine), info, self.now_s)

    def make_request(self, prefix: tuple[int, ...] = ()) -> Request:
        """Return a new request; prompt sizes are heavy-tailed unless it begins as others do."""
        self._num_requests += 1
        num_tokens = min(16_000, int(self.rng.lognormvariate(6.0, 1.2)) + 1)
        return Request(
            id=f"request-{self._num_requests:012d}",
            model="m",
            num_prompt_tokens=_PREFIX_TOKENS if prefix else num_tokens,
            max_output_tokens=512,
            num_bytes=2048,
            arrival_s=self.now_s,
            prefix_hashes=prefix or tuple(self.rng.getrandbits(62) for _ in range(_NUM_HASHES)),
            prefix_block_share=1.0 / _NUM_HASHES,
        )

    def make_snapshot(self, engine: int, num_pending: int, num_free: int) -> EngineSnapshot:
        """Return the snapshot of an engine that decodes, has so many tokens to prefill and so many
        KV tokens free."""
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

    def record_bookings(self, decisions: list) -> list[Dispatch]:
        """Record the bookings, for later snapshots to confirm. Return the dispatches."""
        dispatches = [each for each in decisions if isinstance(each, Dispatch)]
        for dispatch in dispatches:
            self._last_booking[int(dispatch.replica_id)] = dispatch.booking
        return dispatches

    def time_call(self, call: Callable[..., list], *args: Any) -> tuple[float, list[Dispatch]]:
        """Call the router. Return the seconds that it took, and the dispatches."""
        begin_s = time.perf_counter()
        decisions = call(*args)
        return time.perf_counter() - begin_s, self.record_bookings(decisions)

    def set_state(self, num_pending: int, num_free: int) -> None:
        """Bring every engine into this state; then fill the hold queue."""
        for engine in range(self.num_engines):
            snapshot = self.make_snapshot(engine, num_pending, num_free)
            self.record_bookings(self.router.on_snapshot(str(engine), snapshot, self.now_s))
        for _ in range(self._num_held):
            self.now_s += 1e-4
            self.record_bookings(self.router.on_arrival(self.make_request(), self.now_s))
        held = self.router.state(self.now_s).held
        assert held.num_requests == self._num_held, held

    def time_nothing(self, num_pending: int, num_free: int) -> float:
        """Return the seconds that a snapshot takes of an engine that is as all others are."""
        engine = self.rng.randrange(self.num_engines)
        state = self.make_snapshot(engine, num_pending, num_free)
        took_s, dispatches = self.time_call(self.router.on_snapshot, str(engine), state, self.now_s)
        assert not dispatches
        return took_s


def free_fleet(harness: RouterHarness, num_decisions: int) -> dict[str, list[float]]:
    """Time events while every engine has room: each arrival is dispatched at once."""
    free = (0, 300_000)
    harness.set_state(*free)
    arrivals, nothings = [], []
    for _ in range(num_decisions):
        harness.now_s += 1e-3
        request = harness.make_request()
        took_s, dispatches = harness.time_call(harness.router.on_arrival, request, harness.now_s)
        assert len(dispatches) == 1
        arrivals.append(took_s)
        harness.router.on_finish(request.id, None, harness.now_s)
        nothings.append(harness.time_nothing(*free))
    return {"arrival dispatched": arrivals, NOTHING: nothings}


def known_prefix(harness: RouterHarness, num_decisions: int) -> dict[str, list[float]]:
    """Time arrivals while every engine has room, and some hold the prompt but for its end."""
    router, num_blocks = harness.router, _PREFIX_TOKENS // _BLOCK_TOKENS
    harness.set_state(0, 300_000)
    prefix = tuple(harness.rng.getrandbits(62) for _ in range(_NUM_HASHES))
    blocks = [harness.rng.getrandbits(63) for _ in range(num_blocks)]
    for engine in range(0, harness.num_engines, _NUM_PER_HOLDER):
        router.on_blocks(str(engine), BlockUpdate(since=-1, until=1, stored=blocks))
    arrivals = []
    for _ in range(1 + num_decisions):
        harness.now_s += 1e-3
        request = harness.make_request(prefix)
        took_s, [dispatch] = harness.time_call(router.on_arrival, request, harness.now_s)
        if dispatch.num_cached_tokens:  # of the first one nothing is known yet
            arrivals.append(took_s)
        router.on_prompt(request.id, dispatch.replica_id, _PREFIX_TOKENS, blocks)
        router.on_finish(request.id, None, harness.now_s)
    return {"arrival dispatched": arrivals}


def full_windows(harness: RouterHarness, num_decisions: int) -> dict[str, list[float]]:
    """Time events while no engine takes more prefill, until a snapshot shows room for the next."""
    return _time_full(harness, num_decisions, (3 * _STEP_TOKENS, 300_000), (0, 300_000))


def full_kv(harness: RouterHarness, num_decisions: int) -> dict[str, list[float]]:
    """Time events while KV caches are full, until a snapshot shows free blocks for some."""
    return _time_full(harness, num_decisions, (0, 150), (0, 40_000))


def _time_full(
    harness: RouterHarness, num_decisions: int, full: tuple[int, int], free: tuple[int, int]
) -> dict[str, list[float]]:
    """Time arrivals at a full fleet, and snapshots by which one engine turns free for a moment.

    `full` and `free`: of an engine, the tokens to prefill and the free KV tokens.
    """
    harness.set_state(*full)
    arrivals, snapshots, nothings = [], [], []
    for _ in range(num_decisions):
        harness.now_s += 1e-3
        engine = harness.rng.randrange(harness.num_engines)
        state = harness.make_snapshot(engine, *free)
        took_s, dispatches = harness.time_call(
            harness.router.on_snapshot, str(engine), state, harness.now_s
        )
        if dispatches:
            snapshots.append(took_s / len(dispatches))
        state = harness.make_snapshot(engine, *full)
        harness.record_bookings(harness.router.on_snapshot(str(engine), state, harness.now_s))
        nothings.append(harness.time_nothing(*full))
        for dispatch in dispatches:  # as many arrive as were dispatched, and those end at once
            took_s, placed = harness.time_call(
                harness.router.on_arrival, harness.make_request(), harness.now_s
            )
            if not placed:
                arrivals.append(took_s)
            harness.record_bookings(
                harness.router.on_finish(dispatch.request_id, None, harness.now_s)
            )
    return {"arrival held": arrivals, "snapshot, per dispatch": snapshots, NOTHING: nothings}


SCENES = {
    "open fleet": free_fleet,
    "open fleet, known prefix": known_prefix,
    "full windows": full_windows,
    "full KV": full_kv,
}


def bytes_per_held(num_held: int, seed: int) -> float:
    """Return the bytes of one held request in the router, without its body."""
    harness = RouterHarness(8, num_held, seed)
    for engine in range(harness.num_engines):
        snapshot = harness.make_snapshot(engine, 3 * _STEP_TOKENS, 300_000)
        harness.router.on_snapshot(str(engine), snapshot, harness.now_s)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(num_held):
        harness.router.on_arrival(harness.make_request(), harness.now_s)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (after - before) / num_held


def time_scene(
    scene: str, num_engines: int, num_held: int, num_decisions: int, seed: int
) -> list[dict[str, Any]]:
    """Return a row for each kind of event in a scene, by the form of the core in this process."""
    num_held = 0 if SCENES[scene] in (free_fleet, known_prefix) else num_held
    harness = RouterHarness(num_engines, num_held, seed)
    gc.collect()
    gc.freeze()
    times_s = SCENES[scene](harness, num_decisions)
    gc.unfreeze()
    return [
        {
            "scene": scene,
            "event": event,
            "engines": num_engines,
            "held": num_held,
            "core": form(),
            "p50": percentile(each_s, 50) * 1e6,
            "p99": percentile(each_s, 99) * 1e6,
            "decisions": len(each_s),
        }
        for event, each_s in times_s.items()
    ]


def in_form(core: str, *arguments: object) -> list[dict[str, Any]] | None:
    """Return the rows of this program in a process with this form of the core; None: there is none.

    Raises `CalledProcessError` if it fails for another reason.
    """
    environment = os.environ | {VARIABLE: core}
    is_there = [sys.executable, "-c", "import serving"]
    if subprocess.run(is_there, env=environment, stderr=subprocess.DEVNULL).returncode:
        return None
    command = [sys.executable, "-m", "benchmarks.overhead.decision", "--child"]
    command += map(str, arguments)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def quietest(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return of each event the row of the run in which its median was lowest."""
    return [min(rows, key=lambda row: row["p50"]) for rows in zip(*runs, strict=True)]


def run(
    sizes: Sequence[int], num_held: int, num_decisions: int, num_repeats: int, seed: int
) -> Report:
    """Time every scene at every size of the fleet in both forms. Return the report."""
    config = {
        "engines": list(sizes),
        "decisions": num_decisions,
        "repeats": num_repeats,
        "held": num_held,
    }
    report = Report("decision", "measured", seed, config)
    rows: list[dict[str, Any]] = []
    scenes = [(name, num_engines) for name in SCENES for num_engines in sizes]
    for name, num_engines in track(scenes, description="decisions"):
        runs: dict[str, list[list[dict[str, Any]]]] = {"plain": [], "compiled": []}
        for core in [*runs] * num_repeats:
            options = ("--scene", name, "--engines", num_engines, "--held", num_held)
            timed = in_form(core, *options, "--decisions", num_decisions, "--seed", seed)
            if timed is not None:
                runs[core].append(timed)
        for timed_runs in runs.values():
            rows += quietest(timed_runs)
    served = "compiled" if any(row["core"] == "compiled" for row in rows) else "plain"
    for row in rows:
        is_nothing = row["event"] == NOTHING
        target_us = TARGET_NOTHING_US if is_nothing else TARGETS_US.get(row["engines"])
        report.add_row("Time of one decision, µs", **row, target=target_us)
    set_targets(report, [row for row in rows if row["core"] == served], sizes)
    report.add_target(
        "bytes per held request beside its body",
        bytes_per_held(num_held, seed),
        f"<= {TARGET_BYTES}",
    )
    report.add_note(f"Targets are compared with the {served} core.")
    report.add_note(f"Of each row the quietest of {num_repeats} runs: others only make it slower.")
    report.add_note("Bytes of Python objects, by tracemalloc; each request has 8 prefix hashes.")
    return report


def set_targets(report: Report, rows: list[dict[str, Any]], sizes: Sequence[int]) -> None:
    """Compare the worst medians of each size with the targets."""
    for num_engines in sizes:
        medians_us = [
            row["p50"] for row in rows if row["engines"] == num_engines and row["event"] != NOTHING
        ]
        if (target_us := TARGETS_US.get(num_engines)) is not None:
            name = f"median decision at {num_engines} engines, worst scene, µs"
            report.add_target(name, max(medians_us), f"<= {target_us}")
    nothings_us = [row["p50"] for row in rows if row["event"] == NOTHING]
    name = f"{NOTHING}, median, worst scene and size, µs"
    report.add_target(name, max(nothings_us), f"<= {TARGET_NOTHING_US}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engines", type=int, nargs="+", default=list(TARGETS_US))
    parser.add_argument("--held", type=int, default=NUM_HELD)
    parser.add_argument("--decisions", type=int, default=500, help="per scene, fleet and run")
    parser.add_argument("--repeats", type=int, default=5, help="runs, of which the quietest counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--scene", choices=SCENES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        [num_engines] = options.engines
        print(
            json.dumps(
                time_scene(
                    options.scene, num_engines, options.held, options.decisions, options.seed
                )
            )
        )
        return 0
    run(options.engines, options.held, options.decisions, options.repeats, options.seed).finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
