"""Is the simulator right? The same requests on two real engines and in simulation.

`python -m benchmarks.fidelity` measures, then compares; `--judge-only` compares anew with
what was measured last. Real runs go through everything that users go through: HTTP, the
gateway, the stream, vLLM. The simulation knows the profile of one engine, measured before
as by `headway profile`: alone, and how much longer steps take while the other engine
steps too, and how long a request is under way outside of any step. How fast the machine was
in a run is told by how long the steps of that run took, for what they computed. What is judged
is what became of these: scheduling, routing and waiting. To that nothing is fitted.
"""

import argparse
import csv
import itertools
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

from benchmarks.fidelity.run_pace import pace
from benchmarks.load.loops import open_loop
from benchmarks.load.mix import Mix
from benchmarks.report.latency import Sample
from benchmarks.report.report import RESULTS, Report
from benchmarks.report.runner import run_to_the_end
from benchmarks.systems.real_engines import RealEngines
from router.simulation.engine.profile import Pace, Profile
from router.simulation.figures import percentile
from router.simulation.variant import OURS
from router.simulation.workload.workload import Arrival, Workload
from serving.capacity import logged_steps
from serving.capacity.client import Client
from serving.capacity.launch import MeasureError
from serving.capacity.profile import measure as measure_profile
from serving.capacity.profiles import load_profile
from serving.capacity.sweep import Fleet, simulate
from serving.capacity.sweep import capacity as simulated_capacity
from serving.config import parse
from serving.planning.hardware import detect_hardware
from serving.planning.plan import make_plan

NUM_ENGINES = 2
LINES = RESULTS / "fidelity-measured.csv"
SURROUNDINGS = RESULTS / "fidelity-measured.json"
_NUM_CONNECTIONS = 64
_TIMEOUT_S = 120.0
# One run of the simulation is as much chance as one of the engines: the median of many.
_NUM_SIMULATIONS = 15
# Long prompts are shorter than those of other comparisons: on slow cores, ten minutes of these
# are enough requests for a percentile.
_MIX = Mix(long_tokens=(200, 600))
_TEMPLATE_TOKENS = 30  # of SmolLM2's chats, about: measured with each run
_TARGETS = {"ttft_p50_s": 0.15, "ttft_p90_s": 0.15, "ttft_p99_s": 0.30, "tokens_per_s": 0.15}

console = Console(highlight=False)


@dataclass(frozen=True, slots=True)
class Measured:
    """One request on the real engines."""

    load: float
    rate: float
    seed: int
    sample: Sample


def measured_profile() -> Profile:
    """Return the profile of an engine as it is here and now."""
    args = {"device": "cpu", "replicas": NUM_ENGINES}
    plan = make_plan(parse(args), detect_hardware())
    return run_to_the_end(lambda: measure_profile(args, plan, "as-measured", console))


async def measure(
    profile: Profile,
    loads: Sequence[float],
    capacity: float,
    duration_s: float,
    seeds: Sequence[int],
    log_folder: Path,
) -> tuple[list[Measured], dict[str, Any]]:
    """Return every request of each seed's run at each load, and what there is to know of them.

    Raises `MeasureError` where a run is too short to tell the machine's pace.
    """
    subject = RealEngines(NUM_ENGINES, {"engine": {"step_log": str(log_folder)}})
    mix = _MIX
    found: list[Measured] = []
    runs: list[dict[str, Any]] = []
    async with subject:
        model = await subject.model()
        await subject.switch(OURS)
        await _send(subject, mix, model, 0.5 * capacity, 15.0, f"{seeds[0]} warm-up")
        for seed, load in itertools.product(seeds, loads):
            rate = load * capacity
            num_prompt_before, _ = await subject.prompt_tokens()
            begin_s = time.monotonic()
            samples = await _send(subject, mix, model, rate, duration_s, f"{seed} {load}")
            num_prompt, _ = await subject.prompt_tokens()
            state = await subject.state()
            num_text = sum(sample.num_text_tokens for sample in samples)
            steps = logged_steps.steps(logged_steps.read_all(log_folder), begin_s)
            try:
                machine = pace(profile, steps)
            except ValueError as error:
                raise MeasureError(f"{error}: raise --duration") from error
            found += [Measured(load, rate, seed, sample) for sample in samples]
            runs.append(
                {
                    "load": load,
                    "requests_per_s": rate,
                    "seed": seed,
                    "template_tokens": (num_prompt - num_prompt_before - num_text) / len(samples),
                    "step_models": [
                        msgspec.to_builtins(each.step_model) for each in state.replicas.values()
                    ],
                    "pace": asdict(machine),
                }
            )
            console.print(
                f"seed {seed}, {load:.0%}: {len(samples)} requests; the machine took "
                f"{machine.memory:.2f} times as long as the profile says to read weights and KV "
                f"cache, and {machine.compute:.2f} times for what each token adds",
                soft_wrap=True,
            )
        replicas = (await subject.state()).replicas.values()
        infos = [msgspec.to_builtins(each.info) for each in replicas]
    return found, {"model": model, "engines": infos, "runs": runs}


async def _send(
    subject: RealEngines, mix: Mix, model: str, rate: float, duration_s: float, seed: str
) -> list[Sample]:
    """Send a part of the mix, from idle to idle."""
    asks = mix.arrivals(rate, duration_s, seed)
    arrivals = [(ask.offset_s, mix.call(ask, model, seed)) for ask in asks]
    async with Client(subject.urls) as client:
        await client.connect(_NUM_CONNECTIONS)
        records = await open_loop(client, arrivals, _TIMEOUT_S)
    await subject.wait_until_idle()
    return [Sample.of(0, OURS, ask, record) for ask, record in zip(asks, records, strict=True)]


def judge(measured: Sequence[Measured], runs: dict[str, Any], profile: Profile) -> Report:
    """Return the report that holds the simulation against what was measured."""
    template_tokens = round(sum(run["template_tokens"] for run in runs["runs"]) / len(runs["runs"]))
    rates = {each.load: each.rate for each in measured}
    seeds = list(dict.fromkeys(each.seed for each in measured))
    samples: dict[int, dict[float, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for each in measured:
        samples[each.seed][each.load].append(each.sample)
    paces = {(run["seed"], run["load"]): Pace(**run["pace"]) for run in runs["runs"]}
    memories = _range([each.memory for each in paces.values()])
    computes = _range([each.compute for each in paces.values()])
    config = {
        "num_engines": NUM_ENGINES,
        "policy": OURS,
        "template_tokens": template_tokens,
        "num_simulations": _NUM_SIMULATIONS,
        "seeds": seeds,
        "mix": asdict(_MIX),
        **runs,
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
                        Fleet(profile.slowed(paces[seed, load]), NUM_ENGINES),
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
            report.row(
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
            report.target(
                f"{figure} at {load:.0%} load, simulated over measured, off by",
                abs(median / real[figure] - 1.0),
                f"<= {tolerance}",
            )
    report.note(
        f"As measured with the profile, requests are {1e3 * profile.path_s:.0f} ms under way "
        f"outside of any step, and steps take {profile.contention:.0%} longer while the other "
        "engine steps too. By the steps of each run, the "
        f"machine took {memories} times as long as the profile says to read weights and KV cache, "
        f"and {computes} times for what each token adds, and steps are simulated so. Nothing was "
        "fitted to the times that are judged."
    )
    report.note(
        "Simulated: the median of as many runs as `num_simulations`, which differ in the noise of "
        "step times alone, and the least and greatest of them. The measured figures are one "
        "draw of such a spread."
    )
    return report


def simulated(
    samples: Sequence[Sample], fleet: Fleet, template_tokens: int, seed: int
) -> list[Sample]:
    """Return what the simulation makes of the same requests."""
    workload = Workload.of(
        "mix",
        (
            Arrival(
                offset_s=sample.due_s,
                num_prompt_tokens=sample.num_text_tokens + template_tokens,
                num_output_tokens=sample.num_output_tokens,
                max_output_tokens=sample.num_output_tokens,
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


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _figures_of_all(runs: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """Figures over the requests of all runs; a run lasts from its first due to its last done."""
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


def _write(measured: Sequence[Measured], runs: dict[str, Any], append: bool) -> None:
    """Write one line per request; with `append`, after those of earlier seeds."""
    fields = ["load", "rate", "seed", *Sample.__dataclass_fields__]
    append = append and LINES.exists()
    with LINES.open("a" if append else "w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if not append:
            writer.writeheader()
        for each in measured:
            row = {"load": each.load, "rate": each.rate, "seed": each.seed}
            writer.writerow(row | asdict(each.sample))
    if append:
        former = json.loads(SURROUNDINGS.read_text())
        runs = {**runs, "runs": former["runs"] + runs["runs"]}
    SURROUNDINGS.write_text(json.dumps(runs, indent=1) + "\n")


def _read() -> tuple[list[Measured], dict[str, Any]]:
    with LINES.open(newline="") as file:
        found = []
        for row in csv.DictReader(file):
            load, rate, seed = float(row.pop("load")), float(row.pop("rate")), int(row.pop("seed"))
            values: dict[str, Any] = {name: text or None for name, text in row.items()}
            values |= {"completed": row["completed"] == "True", "error": row["error"]}
            sample = msgspec.convert(values, Sample, strict=False)
            found.append(Measured(load, rate, seed, sample))
    return found, json.loads(SURROUNDINGS.read_text())


def _capacity(profile: Profile) -> float:
    """Requests per second that both engines carry, as the simulation has it."""
    workload = Workload.of(
        "mix",
        (
            Arrival(
                offset_s=0.0,
                num_prompt_tokens=ask.num_text_tokens + _TEMPLATE_TOKENS,
                num_output_tokens=ask.num_output_tokens,
                max_output_tokens=ask.num_output_tokens,
            )
            for ask in itertools.islice(_MIX.asks("capacity"), 400)
        ),
    )
    return simulated_capacity(workload, Fleet(profile, NUM_ENGINES))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--profile",
        help="of one engine here; default: measured first, and with --append or --judge-only that "
        "of last time",
    )
    parser.add_argument("--loads", type=float, nargs="+", default=[0.4, 0.6, 0.8])
    parser.add_argument("--capacity", type=float, help="requests/s; default: by the simulation")
    parser.add_argument("--duration", type=float, default=75.0, help="of arrivals at each load, s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--append", action="store_true", help="keep what other seeds have shown")
    parser.add_argument("--measure-only", action="store_true")
    parser.add_argument("--judge-only", action="store_true")
    options = parser.parse_args()
    if options.profile and (options.judge_only or options.append):
        parser.error("--profile: what was measured is judged by the profile of that time")
    former = options.judge_only or options.append
    if options.profile:
        profile = load_profile(options.profile)
    elif former:
        profile = Profile.model_validate(json.loads(SURROUNDINGS.read_text())["profile"])
    else:
        profile = measured_profile()
    if not options.judge_only:
        capacity = options.capacity or _capacity(profile)
        with tempfile.TemporaryDirectory(prefix="headway-steps-") as folder:
            measured, runs = run_to_the_end(
                lambda: measure(
                    profile,
                    options.loads,
                    capacity,
                    options.duration,
                    options.seeds,
                    Path(folder),
                )
            )
        runs["profile"] = profile.model_dump()
        _write(measured, runs, options.append)
    if not options.measure_only:
        measured, runs = _read()
        judge(measured, runs, profile).finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
