"""What does the path from client to engine cost?

    python -m benchmarks.overhead

The engines are null engines, so everything above the floor (client straight to the engines) is
ours: gateway, front and their processes. Load generator, engines and path share the machine's
cores. `--short` takes half a minute and compares ratios to the floor with those of the last time.
"""

import argparse
import asyncio
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.overhead import gateways, phases, seen, short
from benchmarks.overhead.figures import ROLES, Figures
from benchmarks.overhead.phases import Durations, PhaseRunner, Window, send_paired
from benchmarks.report.report import Report, percentile
from benchmarks.report.runner import print_progress, run_to_the_end
from benchmarks.systems.processes import raise_file_limit
from benchmarks.systems.system import Floor, NullHeadway
from router.simulation.figures import brief

FRONTS = ("own", "haproxy")
DEFAULT_FRONT = "own"
NUM_ENGINES = 2
_QUICK = Durations(1, 2.0, 4.0, slow_s=3.0, busy_s=3.0, fast_s=2.0, flat_out_s=2.0, short_s=1.0)


async def run(fronts: Sequence[str], durations: Durations, seed: int) -> Report:
    """Measure every front, and the floor beside the first. Return the report."""
    config = {
        "fronts": list(fronts),
        "default_front": DEFAULT_FRONT,
        "num_engines": NUM_ENGINES,
        "num_streams": phases.NUM_STREAMS,
        "num_tokens_per_stream": phases.NUM_TOKENS,
        "num_crowd": phases.NUM_OPEN_STREAMS,
        "num_short_workers": phases.NUM_SHORT_WORKERS,
        "long_streams_per_s": phases.LONG_STREAMS_PER_S,
        "probes_per_s": phases.PROBES_PER_S,
        **vars(durations),
    }
    report = Report("overhead", "measured", seed, config)
    figures = Figures()
    for front in fronts:
        started_s = time.perf_counter()
        async with NullHeadway(front, NUM_ENGINES) as system, Floor(NUM_ENGINES) as floor_system:
            print_progress(f"{front}: ready after {time.perf_counter() - started_s:.0f} s")
            path = PhaseRunner(system, durations)
            floor = PhaseRunner(floor_system, durations)
            await path.measure_idle()
            for role in ROLES:
                figures.add(front, "Cores used while idle", role, path.idle_cores[role])
            for repeat in range(durations.num_repeats):
                await _measure_open_streams(path, system, figures)
                await _measure_ttft(path, floor, figures, f"{seed}-{repeat}")
                await _measure_rates(path, figures)
                if front == fronts[0]:
                    await _measure_rates(floor, figures)
                gc.collect()
        for each in (path, floor):
            for reason, count in each.failures.most_common(5):
                report.add_note(f"{each.system.name}: {count} requests failed: {reason}")
    figures.fill(report)
    if DEFAULT_FRONT in fronts:
        figures.set_targets(report, DEFAULT_FRONT)
    return report


async def _measure_open_streams(path: PhaseRunner, system: NullHeadway, figures: Figures) -> None:
    (usage,) = path.usages

    def gateway_mb() -> float:
        usage.refresh()
        return usage.rss_bytes("gateway") / 1e6

    before, during, num_left = await path.hold_open_streams(
        gateway_mb, system.num_streams_in_engines
    )
    figures.add_open_streams(system.name, before, during, num_left)
    _print(path, f"1,000 streams: gateway {brief(during)} MB; {num_left} left 1 s after")
    await asyncio.sleep(0.5)


async def _measure_ttft(path: PhaseRunner, floor: PhaseRunner, figures: Figures, seed: str) -> None:
    mine, base = await send_paired(path, floor, path.durations.ttft_s, seed)
    name = path.system.name
    for percent in (50, 99):
        ours_ms, floor_ms = (
            percentile([record.ttft_s for record in records], percent) * 1e3
            for records in (mine, base)
        )
        figures.add_ttft(name, percent, ours_ms, floor_ms)
        _print(path, f"TTFT p{percent} {brief(ours_ms)} ms, floor {brief(floor_ms)} ms")
    figures.add_lateness(name, percentile([record.late_s for record in mine], 99) * 1e3)


async def _measure_rates(path: PhaseRunner, figures: Figures) -> None:
    name, durations = path.system.name, path.durations
    for rate, span_s in (
        (phases.SLOW, durations.slow_s),
        (phases.BUSY, durations.busy_s),
        (phases.FAST, durations.fast_s),
    ):
        window, ttft_s = await path.stream_at_rate(rate, span_s)
        figures.add_rate(name, rate, window)
        if rate == phases.BUSY:
            p50_ms, p99_ms = (percentile(ttft_s, percent) * 1e3 for percent in (50, 99))
            figures.add_ttft_when_busy(name, p50_ms, p99_ms)
        _print_rate(path, f"asked for {rate}", window)
    window = await path.stream_flat_out()
    figures.add_flat_out(name, window)
    _print_rate(path, "flat out", window)
    for kind, stream in (("whole", False), ("streamed", True)):
        window = await path.send_short_requests(stream)
        figures.add_short(name, kind, window)
        _print(path, f"short requests, {kind}: {brief(window.requests_per_s)}/s")


def _print_rate(path: PhaseRunner, what: str, window: Window) -> None:
    _print(path, f"{what}: {brief(window.tokens_per_s)} tokens/s")


def _print(path: PhaseRunner, text: str) -> None:
    print_progress(f"{path.system.name:7} {text}")


def _run_short() -> int:
    """Measure the short form and add its row to the file. Return 1 after a gross regression."""
    figures, row = run_to_the_end(short.measure)
    history = short.read_history()
    short.make_report(figures, row, history).finish()
    lines, grown = short.compare(row, short.last_comparable(history, row))
    for line in lines:
        print_progress(line)
    for name in grown:
        print_progress(f"more than {short.MAX_GROWTH:g} times as much as before: {name}")
    return 1 if grown else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short repeat: a smoke test")
    parser.add_argument(
        "--short", action="store_true", help="ratios to the floor only, beside the last ones"
    )
    parser.add_argument(
        "--gateways", nargs="+", type=int, metavar="N", help="so many that share the port, beside"
    )
    parser.add_argument("--seen", action="store_true", help="what log, page and traces add, only")
    parser.add_argument(
        "--checkout", type=Path, metavar="FOLDER", help="with --seen: another to compare with"
    )
    parser.add_argument("--repeats", type=int, help="of all phases: 3, with --quick 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--front", nargs="+", choices=FRONTS, default=list(FRONTS))
    options = parser.parse_args()
    raise_file_limit()  # 1,000 clients are 1,000 sockets, here and in what is started
    gc.disable()  # its pauses would be in the times; garbage is collected between repeats
    if options.short:
        return _run_short()
    durations = _QUICK if options.quick else Durations()
    if options.repeats:
        durations = replace(durations, num_repeats=options.repeats)
    if options.seen:
        checkout = options.checkout.resolve() if options.checkout else None
        span_s, num_repeats = (1.0, 1) if options.quick else (4.0, options.repeats or 7)
        report = run_to_the_end(lambda: seen.run(span_s, num_repeats, options.seed, checkout))
    elif options.gateways:
        report = run_to_the_end(lambda: gateways.run(options.gateways, durations, options.seed))
    else:
        report = run_to_the_end(lambda: run(options.front, durations, options.seed))
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
