"""Is the simulator right? The same requests on two real engines and in simulation.

    python -m benchmarks.fidelity

Measures, then compares; `--judge-only` compares again with what was measured last. Real requests
pass through everything that a user's do: HTTP, the gateway, the stream, vLLM. The simulation knows
the profile of one engine, measured before as by `headway profile`: what its steps take, how much
longer they take while the other engine steps too, and how long a request is under way outside of
any step. How fast the machine was in a run follows from the steps of that run: how long they took
for what they computed. What is judged is the rest: scheduling, routing and waiting. Nothing is
fitted to these.
"""

import argparse
import itertools
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fidelity.measured_runs import (
    MIX,
    NUM_ENGINES,
    MeasuredRequest,
    measure,
    read_provenance,
    read_requests,
    write,
)
from benchmarks.report.console import make_console
from benchmarks.report.latency import Sample
from benchmarks.report.report import Report
from benchmarks.report.runner import run_to_the_end
from router.simulation.engine.profile import Profile, StepTimeFactors
from router.simulation.figures import percentile
from router.simulation.variant import OURS
from router.simulation.workload.workload import Arrival, Workload
from serving.capacity.profile import measure as measure_profile
from serving.capacity.profiles import load_profile
from serving.capacity.sweep import Fleet, simulate, simulated_capacity
from serving.config import parse
from serving.planning.hardware import detect_hardware
from serving.planning.plan import make_plan

# One simulated run is as random as one real run: the median of many counts.
_NUM_SIMULATIONS = 15
_NUM_CAPACITY_REQUESTS = 400
_TEMPLATE_TOKENS = 30  # of SmolLM2's chats, about: each run measures them
_TARGETS = {"ttft_p50_s": 0.15, "ttft_p90_s": 0.15, "ttft_p99_s": 0.30, "tokens_per_s": 0.15}


def measured_profile() -> Profile:
    """Measure the profile of an engine here and now, and return it."""
    args = {"device": "cpu", "replicas": NUM_ENGINES}
    plan = make_plan(parse(args), detect_hardware())
    console = make_console()
    return run_to_the_end(lambda: measure_profile(args, plan, "as-measured", console))


def judge(
    measured: Sequence[MeasuredRequest], provenance: dict[str, Any], profile: Profile
) -> Report:
    """Simulate what was measured. Return the report that compares both."""
    runs = provenance["runs"]
    template_tokens = round(sum(run["template_tokens"] for run in runs) / len(runs))
    rates = {each.load: each.rate for each in measured}
    seeds = list(dict.fromkeys(each.seed for each in measured))
    samples: dict[int, dict[float, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for each in measured:
        samples[each.seed][each.load].append(each.sample)
    factors = {(run["seed"], run["load"]): StepTimeFactors(**run["pace"]) for run in runs}
    memories = _range([each.memory for each in factors.values()])
    computes = _range([each.compute for each in factors.values()])
    config = {
        "num_engines": NUM_ENGINES,
        "policy": OURS,
        "template_tokens": template_tokens,
        "num_simulations": _NUM_SIMULATIONS,
        "seeds": seeds,
        "mix": asdict(MIX),
        **provenance,
        "profile": profile.model_dump(),
    }
    report = Report("fidelity", "simulated", 0, config)
    for load, rate in sorted(rates.items()):
        judged = [samples[seed][load] for seed in seeds]
        real = _figures_of_all(judged)
        simulated_runs = [
            _figures_of_all(
                [
                    simulated(
                        each,
                        Fleet(profile.slowed(factors[seed, load]), NUM_ENGINES),
                        template_tokens,
                        1000 * number + seed,
                    )
                    for seed, each in zip(seeds, judged, strict=True)
                ]
            )
            for number in range(_NUM_SIMULATIONS)
        ]
        for figure, tolerance in _TARGETS.items():
            values = sorted(each[figure] for each in simulated_runs)
            median = values[len(values) // 2]
            report.add_row(
                "Two real engines and the simulation of them",
                load=f"{load:.0%}, {rate:.2f}/s",
                requests=sum(map(len, judged)),
                figure=figure,
                measured=real[figure],
                simulated=median,
                from_=values[0],
                to=values[-1],
                off_by=f"{median / real[figure] - 1.0:+.0%}",
            )
            report.add_target(
                f"{figure} at {load:.0%} load, simulated over measured, off by",
                abs(median / real[figure] - 1.0),
                f"<= {tolerance}",
            )
    report.add_note(
        f"By the profile, requests are {1e3 * profile.path_s:.0f} ms under way outside any step, "
        f"and steps take {profile.contention:.0%} longer while the other engine steps too. By the "
        f"steps of each run, the machine took {memories} times as long as the profile says to read "
        f"weights and KV cache, and {computes} times for what each token adds; the simulated steps "
        "take as long. Nothing was fitted to the times that are judged."
    )
    report.add_note(
        "Simulated: the median, the least and the greatest of `num_simulations` runs, which differ "
        "only in the noise of step times. The measured figures are one draw of such a spread."
    )
    return report


def simulated(
    samples: Sequence[Sample], fleet: Fleet, template_tokens: int, seed: int
) -> list[Sample]:
    """Simulate the same requests. Return them with the simulated times."""
    workload = Workload.of(
        "mix",
        (
            _arrival(
                sample.due_s, sample.num_text_tokens + template_tokens, sample.num_output_tokens
            )
            for sample in samples
        ),
    )
    run = simulate(workload, fleet, OURS, seed=seed)
    columns = zip(samples, run.ttft_s.tolist(), run.e2e_s.tolist(), strict=True)
    return [
        Sample(**asdict(sample) | {"ttft_s": ttft_s, "e2e_s": e2e_s})
        for sample, ttft_s, e2e_s in columns
    ]


def _arrival(offset_s: float, num_prompt_tokens: int, num_output_tokens: int) -> Arrival:
    return Arrival(
        offset_s=offset_s,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        max_output_tokens=num_output_tokens,
    )


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _figures_of_all(runs: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """Return the figures over the requests of all runs. A run lasts from first due to last end."""
    ttft_s = np.array(
        [each.ttft_s if each.ttft_s is not None else np.nan for run in runs for each in run]
    )
    num_tokens = sum(each.num_output_tokens for run in runs for each in run)
    span_s = sum(
        max(each.due_s + each.e2e_s for each in run if each.e2e_s is not None)
        - min(each.due_s for each in run)
        for run in runs
    )
    return {
        "ttft_p50_s": percentile(ttft_s, 50),
        "ttft_p90_s": percentile(ttft_s, 90),
        "ttft_p99_s": percentile(ttft_s, 99),
        "tokens_per_s": num_tokens / span_s,
    }


def _capacity(profile: Profile) -> float:
    """Return the requests per second that both engines carry, by the simulation."""
    workload = Workload.of(
        "mix",
        (
            _arrival(0.0, each.num_text_tokens + _TEMPLATE_TOKENS, each.num_output_tokens)
            for each in itertools.islice(MIX.requests("capacity"), _NUM_CAPACITY_REQUESTS)
        ),
    )
    return simulated_capacity(workload, Fleet(profile, NUM_ENGINES))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--profile",
        help="of one engine here; default: measured first, or with --append and --judge-only the "
        "last one",
    )
    parser.add_argument("--loads", type=float, nargs="+", default=[0.4, 0.6, 0.8])
    parser.add_argument("--capacity", type=float, help="requests/s; default: simulated")
    parser.add_argument(
        "--duration", type=float, default=75.0, help="seconds of arrivals at each load"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--append", action="store_true", help="keep what was measured with other seeds"
    )
    parser.add_argument("--measure-only", action="store_true", help="do not compare")
    parser.add_argument("--judge-only", action="store_true", help="compare what was measured last")
    options = parser.parse_args()
    if options.profile and (options.judge_only or options.append):
        parser.error("--profile: earlier measurements are judged by the profile of that time")
    former = options.judge_only or options.append
    if options.profile:
        profile = load_profile(options.profile)
    elif former:
        profile = Profile.model_validate(read_provenance()["profile"])
    else:
        profile = measured_profile()
    if not options.judge_only:
        capacity = options.capacity or _capacity(profile)
        with tempfile.TemporaryDirectory(prefix="headway-steps-") as folder:
            measured, provenance = run_to_the_end(
                lambda: measure(
                    profile,
                    options.loads,
                    capacity,
                    options.duration,
                    options.seeds,
                    Path(folder),
                )
            )
        provenance["profile"] = profile.model_dump()
        write(measured, provenance, options.append)
    if not options.measure_only:
        judge(read_requests(), read_provenance(), profile).finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
