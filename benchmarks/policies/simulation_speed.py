"""How many requests the simulator gets through in a second of one core.

    python -m benchmarks.policies.simulation_speed

The measured case: profile h100, questions and documents (`synthetic.poisson`, seed 0) at 15
requests/s per engine, one gateway, in this process; requests over CPU seconds. The
router's share is that of a further run under cProfile, which makes small functions dearer.
"""

import argparse
import cProfile
import pstats
import sys
import time
from collections.abc import Sequence

from rich.console import Console

from benchmarks.report.report import Figure, Report, Spread
from router.simulation.variant import OURS
from router.simulation.workload.synthetic import poisson
from router.simulation.workload.workload import Workload
from serving.capacity.profiles import load_profile
from serving.capacity.sweep import Fleet, simulate

_PROFILE = "h100"
_RATE_PER_ENGINE = 15.0
_POLICIES = (OURS, "round_robin")
_TARGET = (8, OURS, ">= 20000")  # engines, policy, requests per second


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engines", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--requests", type=int, default=6000, help="of each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="show the table, write nothing")
    options = parser.parse_args(arguments)
    config = {"profile": _PROFILE, "rate_per_engine": _RATE_PER_ENGINE} | vars(options)
    report = Report("sim-speed", "measured", 0, config)
    profile = load_profile(_PROFILE)
    base = poisson(options.requests, 0)
    for num_engines in options.engines:
        workload = base.at_rate(_RATE_PER_ENGINE * num_engines)
        fleet = Fleet(profile, num_engines)
        for policy in _POLICIES:
            speed = Spread.of(
                [len(base) / _cpu_s(workload, fleet, policy) for _ in range(options.repeats)]
            )
            figures: dict[str, Figure] = {
                "engines": str(num_engines),
                "policy": policy,
                "requests/s": speed,
                "router's_share": _router_share(workload, fleet, policy),
            }
            report.row("Speed of the simulator, one core", **figures)
            if (num_engines, policy) == _TARGET[:2]:
                report.target("simulated requests per second", speed, _TARGET[2])
    if options.dry:
        report.show(Console())
    else:
        report.finish()
    return 0


def _cpu_s(workload: Workload, fleet: Fleet, policy: str) -> float:
    began_s = time.process_time()
    simulate(workload, fleet, policy)
    return time.process_time() - began_s


def _router_share(workload: Workload, fleet: Fleet, policy: str) -> float:
    """Return which part of a run is spent in calls of gateways to their routers."""
    profiler = cProfile.Profile()
    profiler.runcall(simulate, workload, fleet, policy)
    stats: dict[tuple[str, int, str], tuple] = vars(pstats.Stats(profiler))["stats"]
    total_s = sum(own_s for _, _, own_s, _, _ in stats.values())
    inside_s = 0.0
    for (file, _, _), (*_, callers) in stats.items():
        if "/router/" in file:
            for (caller_file, _, _), (_, _, _, cumulative_s) in callers.items():
                if caller_file.endswith("simulated_gateway.py"):
                    inside_s += cumulative_s
    return inside_s / total_s


if __name__ == "__main__":
    sys.exit(main())
