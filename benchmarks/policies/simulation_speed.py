"""How many requests does the simulator run through in a CPU second?

    python -m benchmarks.policies.simulation_speed

Measured with profile h100, questions and documents (`synthetic.poisson`, seed 0) at 15 requests/s
per engine, one gateway, in this process. The router's share is that of another run under cProfile,
which slows small functions down most.
"""

import argparse
import cProfile
import inspect
import pstats
import sys
import time
from pathlib import Path

from rich.console import Console

import router
from benchmarks.report.report import Figure, Report, Spread
from router.simulation import gateway
from router.simulation.variant import OURS
from router.simulation.workload.synthetic import poisson
from router.simulation.workload.workload import Workload
from serving.capacity.profiles import load_profile
from serving.capacity.sweep import Fleet, simulate

_PROFILE = "h100"
_RATE_PER_ENGINE = 15.0
_POLICIES = (OURS, "round_robin")
_TARGET = (8, OURS, ">= 20000")  # engines, policy, requests per second


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engines", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--requests", type=int, default=6000, help="of each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="show the table, write nothing")
    options = parser.parse_args()
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
                "router's_share": router_share(workload, fleet, policy),
            }
            report.add_row("Speed of the simulator, one core", **figures)
            if (num_engines, policy) == _TARGET[:2]:
                report.add_target("simulated requests per second", speed, _TARGET[2])
    if options.dry:
        report.show(Console())
    else:
        report.finish()
    return 0


def _cpu_s(workload: Workload, fleet: Fleet, policy: str) -> float:
    began_s = time.process_time()
    simulate(workload, fleet, policy)
    return time.process_time() - began_s


def router_share(workload: Workload, fleet: Fleet, policy: str) -> float:
    """Return the share of a run's time that gateways spend in calls to their routers."""
    profiler = cProfile.Profile()
    profiler.runcall(simulate, workload, fleet, policy)
    stats: dict[tuple[str, int, str], tuple] = vars(pstats.Stats(profiler))["stats"]
    total_s = sum(own_s for _, _, own_s, _, _ in stats.values())
    inside_s = 0.0
    for (file, _, _), (*_, callers) in stats.items():
        if is_router(file):
            for (caller_file, _, _), (_, _, _, cumulative_s) in callers.items():
                if caller_file == gateway.__file__:
                    inside_s += cumulative_s
    return inside_s / total_s


def is_router(file: str) -> bool:
    """Whether the file is of the router that serves, too: not of the simulation around it.

    `carry_out` is neither: it calls back into the gateway.
    """
    path = Path(file)
    core, simulation = Path(router.__file__).parent, Path(gateway.__file__).parent
    return (
        core in path.parents
        and simulation not in path.parents
        and file != inspect.getfile(router.carry_out)
    )


if __name__ == "__main__":
    sys.exit(main())
