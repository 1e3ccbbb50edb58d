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
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Sequence

import uvloop
from rich.console import Console

from benchmarks import phases
from benchmarks.phases import LOAD_ROLE, OTHERS_ROLE, Durations, Prober, Window
from benchmarks.processes import OTHER_ROLE
from benchmarks.report import Report, Spread, brief, percentile
from benchmarks.subjects import Floor, Headway

FRONTS = ("own", "haproxy")
DEFAULT_FRONT = "own"
NUM_ENGINES = 2
_ROLES = ("gateway", "front", "engines", OTHER_ROLE, LOAD_ROLE)
_QUICK = Durations(1, idle_s=2.0, ttft_s=4.0, paced_s=3.0, flat_out_s=2.0, short_s=1.0)
# More than this taken by strangers, and the figures say more about them.
_QUIET_CORES = 0.1

console = Console()


class Figures:
    """All figures of one subject, one value per repeat."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, name: str, value: float) -> None:
        self._values[name].append(value)

    def add_window(self, name: str, window: Window, count: int) -> None:
        """Add CPU time per token or request by role, and the strangers' cores."""
        for role in _ROLES:
            self.add(f"{name} µs {role}", window.cpu_s[role] / count * 1e6)
        self.add(f"{name} µs path", sum(window.cpu_s[r] for r in _PATH) / count * 1e6)
        self.add("others cores", window.cores(OTHERS_ROLE))

    def get(self, name: str) -> Spread | None:
        return Spread.of(self._values[name]) if name in self._values else None

    def largest(self, name: str) -> float | None:
        return max(self._values[name]) if name in self._values else None

    def added(self, name: str, floor: "Figures") -> Spread | None:
        """Return this figure less the floor's median."""
        mine, base = self.get(name), floor.get(name)
        if mine is None or base is None:
            return None
        return Spread.of([value - base.median for value in mine.values])


_PATH = ("gateway", "front")


async def measure(prober: Prober, figures: Figures, seed: str, path: bool) -> None:
    """Run all phases once; `path` says whether a gateway is there to be looked at."""
    subject = prober.subject

    def say(text: str) -> None:
        console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {subject.name:8} {text}")

    if path:
        launch = subject.launches[0]

        def rss_mb() -> float:
            launch.refresh()
            return launch.rss_bytes("gateway") / 1e6

        before, during, num_left = await prober.crowd(rss_mb)
        figures.add("rss idle", before)
        figures.add("rss crowd", during)
        figures.add("rss added", during - before)
        figures.add("left", num_left)
        say(f"1,000 streams: {brief(during)} MB, {num_left} left after they vanished")
        await asyncio.sleep(0.5)
    _add_ttft(figures, "ttft", await prober.ttft(seed))
    say(f"TTFT p50 {brief(figures.get('ttft p50').values[-1])} ms")
    window, ttft = await prober.paced()
    figures.add("paced rate", window.tokens_per_s)
    figures.add_window("token", window, window.num_tokens)
    _add_ttft(figures, "loaded ttft", ttft)
    say(
        f"paced: {brief(window.tokens_per_s)} tokens/s, "
        f"{brief(figures.get('token µs path').values[-1])} µs/token in gateway and front"
    )
    window = await prober.flat_out()
    figures.add("flat out", window.tokens_per_s)
    say(f"flat out: {brief(window.tokens_per_s)} tokens/s")
    for name, stream in (("whole", False), ("streamed", True)):
        window = await prober.short(stream)
        figures.add(f"{name} rate", window.requests_per_s)
        figures.add_window(name, window, window.num_requests)
        say(f"short requests, {name}: {brief(window.requests_per_s)}/s")
    gc.collect()


def _add_ttft(figures: Figures, name: str, ttft_s: Sequence[float]) -> None:
    for percent in (50, 99):
        figures.add(f"{name} p{percent}", percentile(ttft_s, percent) * 1e3)


async def run(fronts: Sequence[str], durations: Durations, seed: int) -> Report:
    """Measure the floor and every front; return the report.

    The floor is measured before, between and after the fronts, so that a
    machine that grows slower or faster meanwhile shows.
    """
    report = Report(
        "overhead",
        "measured",
        seed,
        {
            "fronts": list(fronts),
            "default_front": DEFAULT_FRONT,
            "num_engines": NUM_ENGINES,
            "num_streams": phases.NUM_STREAMS,
            "num_tokens_per_stream": phases.NUM_TOKENS,
            "step_s": phases.STEP_S,
            "num_crowd": phases.NUM_CROWD,
            **vars(durations),
        },
    )
    floor = Prober(Floor(NUM_ENGINES), durations)
    probers: dict[str, tuple[Prober, Figures]] = {"floor": (floor, Figures())}
    await _session(floor, probers["floor"][1], [f"{seed}-0"], path=False)
    for number, front in enumerate(fronts, start=1):
        prober, figures = Prober(Headway(front, NUM_ENGINES), durations), Figures()
        probers[front] = prober, figures
        seeds = [f"{seed}-{repeat}" for repeat in range(durations.num_repeats)]
        await _session(prober, figures, seeds, path=True)
        floor.subject = Floor(NUM_ENGINES)
        await _session(floor, probers["floor"][1], [f"{seed}-{number}"], path=False)
    _fill(report, probers)
    return report


async def _session(prober: Prober, figures: Figures, seeds: Sequence[str], path: bool) -> None:
    started_s = time.perf_counter()
    async with prober.subject as subject:
        console.print(f"{subject.name}: ready after {time.perf_counter() - started_s:.1f} s")
        await prober.idle()
        for seed in seeds:
            await measure(prober, figures, seed, path)


def _fill(report: Report, probers: dict[str, tuple[Prober, Figures]]) -> None:
    floor = probers["floor"][1]
    for name, (prober, figures) in probers.items():
        get = figures.get
        report.row(
            "Time to first token, ms",
            path=name,
            p50=get("ttft p50"),
            p99=get("ttft p99"),
            added_p50=None if figures is floor else figures.added("ttft p50", floor),
            added_p99=None if figures is floor else figures.added("ttft p99", floor),
            p50_at_20k_tokens_per_s=get("loaded ttft p50"),
            p99_at_20k_tokens_per_s=get("loaded ttft p99"),
        )
        report.row("Highest rate, flat out", path=name, tokens_per_s=get("flat out"))
        report.row(
            "CPU µs per streamed token, net of idle",
            path=name,
            tokens_per_s=get("paced rate"),
            gateway_and_front=get("token µs path"),
            **{role: get(f"token µs {role}") for role in _ROLES},
        )
        for kind in ("whole", "streamed"):
            report.row(
                "Short requests (1 to 4 tokens), CPU µs per request, net of idle",
                path=f"{name}, {kind}",
                requests_per_s=get(f"{kind} rate"),
                gateway_and_front=get(f"{kind} µs path"),
                **{role: get(f"{kind} µs {role}") for role in _ROLES},
            )
        if figures is not floor:
            report.row(
                "1,000 open streams",
                path=name,
                gateway_MB_before=get("rss idle"),
                gateway_MB_with_them=get("rss crowd"),
                added_MB=get("rss added"),
                left_1_s_after_they_vanished=get("left"),
            )
        report.row(
            "Background",
            path=name,
            **{f"{role}_idle_cores": prober.idle_cores[role] for role in _ROLES},
            strangers_cores=get("others cores"),
            failed_requests=sum(prober.failures.values()),
        )
        _note(report, name, prober, figures)
    if DEFAULT_FRONT in probers:
        _set_targets(report, probers[DEFAULT_FRONT][1], floor)


def _note(report: Report, name: str, prober: Prober, figures: Figures) -> None:
    for reason, count in prober.failures.most_common(5):
        report.note(f"{name}: {count} requests failed: {reason}")
    if (busy := figures.largest("others cores")) is not None and busy > _QUIET_CORES:
        report.note(
            f"{name}: other programs took up to {busy:.1f} cores meanwhile: "
            "the rates are lower bounds, the times upper bounds"
        )


def _set_targets(report: Report, figures: Figures, floor: Figures) -> None:
    get = figures.get
    report.target("tokens/s, default front", get("flat out"), ">= 50000")
    report.target(
        "CPU µs per token in gateway and front at 20,000 tokens/s over 200 streams",
        get("token µs path"),
        "<= 40",
    )
    report.target("tokens/s reached in that test", get("paced rate"), ">= 19000")
    report.target("added TTFT p50, ms", figures.added("ttft p50", floor), "<= 2")
    report.target("added TTFT p99, ms", figures.added("ttft p99", floor), "<= 5")
    report.target("short requests/s, whole replies", get("whole rate"), ">= 2000")
    report.target("short requests/s, streamed replies", get("streamed rate"), ">= 2000")
    report.target(
        "gateway MB added by 1,000 open streams, worst", figures.largest("rss added"), "<= 200"
    )
    report.target(
        "gateway MB in all with 1,000 open streams, worst", figures.largest("rss crowd"), "<= 200"
    )
    report.target(
        "streams left in the engines 1 s after 1,000 clients vanished, worst",
        figures.largest("left"),
        "<= 0",
    )


async def _run_until_told(fronts: Sequence[str], durations: Durations, seed: int) -> Report:
    """`run`, ended in good order by a signal: every subject is taken down on the way out."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await run(fronts, durations, seed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short repeat: a smoke test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--front", nargs="+", choices=FRONTS, default=list(FRONTS))
    options = parser.parse_args()
    # A thousand clients are a thousand sockets here and in what we start.
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    gc.disable()  # its pauses would be found in the times; collected between phases
    durations = _QUICK if options.quick else Durations()
    try:
        report = uvloop.run(_run_until_told(options.front, durations, options.seed))
    except asyncio.CancelledError:
        console.print("Stopped before the end: nothing is written.")
        return 130
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
