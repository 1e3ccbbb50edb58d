"""What the path from client to engine costs: `python -m benchmarks.overhead`.

The engines are stand-ins without a model, so everything above the floor
(client straight to the engines) is ours: gateway, front and their processes.
Load generator, engines and path share the machine's cores, as everywhere
where these figures are compared.
"""

import argparse
import asyncio
import gc
import resource
import sys
import time
from collections.abc import Sequence

from rich.console import Console

from benchmarks.overhead import phases
from benchmarks.overhead.figures import ROLES, Figures
from benchmarks.overhead.phases import Durations, Prober, Window, paired_ttft
from benchmarks.report.report import Report, percentile
from benchmarks.report.runner import run_to_the_end
from benchmarks.systems.system import Floor, Headway
from router.simulation.figures import brief

FRONTS = ("own", "haproxy")
DEFAULT_FRONT = "own"
NUM_ENGINES = 2
_QUICK = Durations(1, idle_s=2.0, ttft_s=4.0, busy_s=3.0, fast_s=2.0, flat_out_s=2.0, short_s=1.0)

console = Console()


async def run(fronts: Sequence[str], durations: Durations, seed: int) -> Report:
    """Measure every front, and the floor beside the first; return the report."""
    config = {
        "fronts": list(fronts),
        "default_front": DEFAULT_FRONT,
        "num_engines": NUM_ENGINES,
        "num_streams": phases.NUM_STREAMS,
        "num_tokens_per_stream": phases.NUM_TOKENS,
        "num_crowd": phases.NUM_CROWD,
        "num_short_workers": phases.NUM_SHORT_WORKERS,
        "long_streams_per_s": phases.LONG_STREAMS_PER_S,
        "probes_per_s": phases.PROBES_PER_S,
        **vars(durations),
    }
    report = Report("overhead", "measured", seed, config)
    figures = Figures()
    for front in fronts:
        started_s = time.perf_counter()
        async with Headway(front, NUM_ENGINES) as subject, Floor(NUM_ENGINES) as floor_subject:
            console.print(f"{front}: ready after {time.perf_counter() - started_s:.0f} s")
            prober, floor = Prober(subject, durations), Prober(floor_subject, durations)
            await prober.idle()
            for role in ROLES:
                figures.add(front, "Cores used while idle", role, prober.idle_cores[role])
            for repeat in range(durations.num_repeats):
                await _crowd(prober, subject, figures)
                await _ttft(prober, floor, figures, f"{seed}-{repeat}")
                await _rates(prober, figures)
                if front == fronts[0]:
                    await _rates(floor, figures)
                gc.collect()
        for each in (prober, floor):
            for reason, count in each.failures.most_common(5):
                report.note(f"{each.subject.name}: {count} requests failed: {reason}")
    figures.fill(report)
    if DEFAULT_FRONT in fronts:
        figures.set_targets(report, DEFAULT_FRONT)
    return report


async def _crowd(prober: Prober, subject: Headway, figures: Figures) -> None:
    (usage,) = prober.usages

    def gateway_mb() -> float:
        usage.refresh()
        return usage.rss_bytes("gateway") / 1e6

    before, during, num_left = await prober.crowd(gateway_mb, subject.num_streams_in_engines)
    figures.add_crowd(subject.name, before, during, num_left)
    _say(prober, f"1,000 streams: gateway {brief(during)} MB; {num_left} left 1 s after")
    await asyncio.sleep(0.5)


async def _ttft(prober: Prober, floor: Prober, figures: Figures, seed: str) -> None:
    mine, base = await paired_ttft(prober, floor, prober.durations.ttft_s, seed)
    name = prober.subject.name
    for percent in (50, 99):
        ours_ms, floor_ms = (
            percentile([record.ttft_s for record in records], percent) * 1e3
            for records in (mine, base)
        )
        figures.add_ttft(name, percent, ours_ms, floor_ms)
        _say(prober, f"TTFT p{percent} {brief(ours_ms)} ms, floor {brief(floor_ms)} ms")
    figures.add_lateness(name, percentile([record.late_s for record in mine], 99) * 1e3)


async def _rates(prober: Prober, figures: Figures) -> None:
    name, durations = prober.subject.name, prober.durations
    window, ttft_s = await prober.paced(phases.BUSY_TOKENS_PER_S, durations.busy_s)
    figures.add_busy(name, window, percentile(ttft_s, 50) * 1e3, percentile(ttft_s, 99) * 1e3)
    _say_rate(prober, "asked for 20,000", window)
    window, _ = await prober.paced(phases.FAST_TOKENS_PER_S, durations.fast_s)
    figures.add_rate(name, "asked for 50,000", window)
    _say_rate(prober, "asked for 50,000", window)
    window = await prober.flat_out()
    figures.add_rate(name, "flat out", window)
    _say_rate(prober, "flat out", window)
    for kind, stream in (("whole", False), ("streamed", True)):
        window = await prober.short(stream)
        figures.add_short(name, kind, window)
        _say(prober, f"short requests, {kind}: {brief(window.requests_per_s)}/s")


def _say_rate(prober: Prober, what: str, window: Window) -> None:
    _say(prober, f"{what}: {brief(window.tokens_per_s)} tokens/s")


def _say(prober: Prober, text: str) -> None:
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {prober.subject.name:7} {text}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short repeat: a smoke test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--front", nargs="+", choices=FRONTS, default=list(FRONTS))
    options = parser.parse_args()
    # A thousand clients are a thousand sockets here and in what we start.
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    gc.disable()  # its pauses would be found in the times; collected between repeats
    durations = _QUICK if options.quick else Durations()
    report = run_to_the_end(lambda: run(options.front, durations, options.seed))
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
