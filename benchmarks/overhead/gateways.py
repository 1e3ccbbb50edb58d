"""What do several gateways carry that share the port?

Load generator, engines and gateways share this machine's cores, so what is sent through tells
mostly of the machine. CPU time is counted by process. From it follows what gateways and engines
would do on the same cores if the load came from elsewhere: a gateway fills one core at most, and
all of them together what engines leave.
"""

import gc
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack

from benchmarks.overhead import phases
from benchmarks.overhead.phases import Durations, PhaseRunner, Window
from benchmarks.report.report import Report, Spread
from benchmarks.report.runner import print_progress
from benchmarks.systems.processes import OTHER_ROLE
from benchmarks.systems.system import NullHeadway
from router.simulation.figures import brief

NUM_ENGINES = 2
_KINDS = (
    "short requests, flat out",
    f"short requests, {phases.SPACED_PER_S}/s asked for",
    f"tokens, {phases.BUSY}/s asked for",
    "tokens, flat out",
)


async def run(numbers: Sequence[int], durations: Durations, seed: int) -> Report:
    """Measure so many gateways, side by side and in turns. Return the report."""
    config = {"num_gateways": list(numbers), "num_engines": NUM_ENGINES, **vars(durations)}
    report = Report("overhead-gateways", "measured", seed, config)
    num_cores = len(os.sched_getaffinity(0))
    windows: dict[tuple[str, int], list[Window]] = {}
    async with AsyncExitStack() as stack:
        runners = {}
        for number in numbers:
            system = await stack.enter_async_context(NullHeadway("own", NUM_ENGINES, number))
            print_progress(f"{system.name}: ready")
            runners[number] = PhaseRunner(system, durations)
        for runner in runners.values():
            await runner.measure_idle()
        for repeat in range(durations.num_repeats):
            turns = list(runners.items())
            for kind in _KINDS:
                for number, runner in turns if repeat % 2 == 0 else reversed(turns):
                    window = await _measure(runner, kind)
                    windows.setdefault((kind, number), []).append(window)
                    print_progress(f"{number} gateways, {kind}: {brief(_rate(kind, window))}/s")
            gc.collect()
        for runner in runners.values():
            for reason, count in runner.failures.most_common(5):
                report.add_note(f"{runner.system.name}: {count} requests failed: {reason}")
    for (kind, number), counted in windows.items():
        cpu_us = {
            role: Spread.of([each.cpu_s[role] / _count(kind, each) * 1e6 for each in counted])
            for role in ("gateway", "engines", phases.LOAD_ROLE)
        }
        without_load = [_without_load(kind, number, each, num_cores) for each in counted]
        report.add_row(
            f"{kind.capitalize()}: per second, and CPU µs of each",
            gateways=str(number),
            sent_through=Spread.of([_rate(kind, each) for each in counted]),
            without_the_load_generator=Spread.of(without_load),
            with_a_core_for_each_gateway=Spread.of(
                [number * _count(kind, each) / each.cpu_s["gateway"] for each in counted]
            ),
            **{f"{role} µs": spread for role, spread in cpu_us.items()},
        )
    report.add_note(
        f"Without the load generator: what {num_cores} cores carry by the CPU time of gateways, "
        "engines and Ray alone, a gateway no more than one core's. With a core for each gateway: "
        "what gateways carry if engines are elsewhere, too. Computed, not sent."
    )
    return report


async def _measure(runner: PhaseRunner, kind: str) -> Window:
    if kind == _KINDS[0]:
        return await runner.send_short_requests(stream=False)
    if kind == _KINDS[1]:
        return await runner.send_spaced_requests(runner.durations.short_s)
    if kind == _KINDS[2]:
        return (await runner.stream_at_rate(phases.BUSY, runner.durations.busy_s))[0]
    return await runner.stream_flat_out()


def _count(kind: str, window: Window) -> int:
    return window.num_requests if kind in _KINDS[:2] else window.num_tokens


def _rate(kind: str, window: Window) -> float:
    return _count(kind, window) / window.elapsed_s


def _without_load(kind: str, num_gateways: int, window: Window, num_cores: int) -> float:
    """Return how many per second fill either all cores or each gateway's."""
    gateway_s = window.cpu_s["gateway"]
    all_s = gateway_s + window.cpu_s["engines"] + max(0.0, window.cpu_s[OTHER_ROLE])
    return _count(kind, window) * min(num_gateways / gateway_s, num_cores / all_s)
