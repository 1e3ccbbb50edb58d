"""How many requests does the simulator run through in a CPU second?

    python -m benchmarks.policies.simulation_speed

Measured with profile h100, questions and documents (`synthetic.poisson`, seed 0) at 15 requests/s
per engine, one gateway, each run in a process of its own, with the core plain and compiled in
turns. The router's share is that of another, plain run under cProfile, which slows small functions
down most.
"""

import argparse
import cProfile
import inspect
import os
import pstats
import subprocess
import sys
import time
from pathlib import Path

import router
from benchmarks.report.console import make_console
from benchmarks.report.report import Figure, Report, Spread
from router.simulation import gateway
from router.simulation.variant import OURS
from router.simulation.workload.synthetic import poisson
from router.simulation.workload.workload import Workload
from serving.capacity.profiles import load_profile
from serving.capacity.sweep import Fleet, simulate
from serving.core_form import VARIABLE, Form

_PROFILE = "h100"
_RATE_PER_ENGINE = 15.0
_POLICIES = (OURS, "round_robin")
_FORMS: tuple[Form, ...] = ("plain", "compiled")
_TARGETS = {(8, OURS): ">= 15000", (8, "round_robin"): ">= 30000"}  # compiled, requests/s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engines", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--policies", nargs="+", default=list(_POLICIES))
    parser.add_argument("--requests", type=int, default=6000, help="of each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--forms", nargs="+", choices=_FORMS, default=_FORMS, help="of the core")
    parser.add_argument("--dry", action="store_true", help="show the table, write nothing")
    parser.add_argument("--one", choices=("speed", "share"), help="print this of the first of all")
    options = parser.parse_args()
    if options.one is not None:
        find = _speed if options.one == "speed" else _share
        print(find(options.requests, options.engines[0], options.policies[0]))
        return 0
    config = {"profile": _PROFILE, "rate_per_engine": _RATE_PER_ENGINE} | vars(options)
    report = Report("sim-speed", "measured", 0, config)
    for num_engines in options.engines:
        for policy in options.policies:
            _measure(report, num_engines, policy, options)
    if options.dry:
        report.show(make_console())
    else:
        report.finish()
    return 0


def _measure(report: Report, num_engines: int, policy: str, options: argparse.Namespace) -> None:
    """Add the row, and the target, of one fleet and policy."""
    speeds: dict[Form, list[float]] = {core: [] for core in options.forms}
    for _ in range(options.repeats):
        for core, found in speeds.items():
            found.append(_ask(core, "speed", num_engines, policy, options.requests))
    figures: dict[str, Figure] = {"engines": str(num_engines), "policy": policy}
    figures |= {f"{core},_requests/s": Spread.of(found) for core, found in speeds.items()}
    if "plain" in speeds:
        share = _ask("plain", "share", num_engines, policy, options.requests)
        figures["router's_share,_plain"] = share
    report.add_row("Speed of the simulator, one core", **figures)
    target = _TARGETS.get((num_engines, policy))
    if target is not None and "compiled" in speeds:
        name = f"simulated requests per CPU second, {policy}, {num_engines} engines, compiled"
        report.add_target(name, Spread.of(speeds["compiled"]), target)


def _ask(core: Form, what: str, num_engines: int, policy: str, num_requests: int) -> float:
    """Return a figure that a process of its own finds, in which the core has this form."""
    command = [sys.executable, "-m", "benchmarks.policies.simulation_speed", "--one", what]
    command += ["--engines", str(num_engines), "--policies", policy]
    command += ["--requests", str(num_requests)]
    done = subprocess.run(
        command, env=os.environ | {VARIABLE: core}, stdout=subprocess.PIPE, check=True
    )
    return float(done.stdout)


def _run_of(num_requests: int, num_engines: int) -> tuple[Workload, Fleet]:
    workload = poisson(num_requests, 0).at_rate(_RATE_PER_ENGINE * num_engines)
    return workload, Fleet(load_profile(_PROFILE), num_engines)


def _speed(num_requests: int, num_engines: int, policy: str) -> float:
    """Return the requests per CPU second of a run."""
    workload, fleet = _run_of(num_requests, num_engines)
    return num_requests / _cpu_s(workload, fleet, policy)


def _share(num_requests: int, num_engines: int, policy: str) -> float:
    return router_share(*_run_of(num_requests, num_engines), policy)


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
