"""What did two real engines do with the mix? Measured, written to disk, read again."""

import csv
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.fidelity.step_time_factors import fit_step_time_factors
from benchmarks.load.loops import open_loop
from benchmarks.load.mix import Mix
from benchmarks.report.latency import Sample
from benchmarks.report.report import RESULTS
from benchmarks.report.runner import print_progress
from benchmarks.systems.real_engines import RealEngines
from router.simulation.engine.profile import Profile
from router.simulation.variant import OURS
from serving.capacity import logged_steps
from serving.capacity.client import Client
from serving.capacity.launch import MeasureError

NUM_ENGINES = 2
# Long prompts are shorter than in other comparisons, so that ten minutes on slow cores have enough
# requests for a percentile.
MIX = Mix(long_tokens=(200, 600))
LINES = RESULTS / "fidelity-measured.csv"
PROVENANCE = RESULTS / "fidelity-measured.json"
_NUM_CONNECTIONS = 64
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class MeasuredRequest:
    """One request on the real engines."""

    load: float
    rate: float
    seed: int
    sample: Sample


async def measure(
    profile: Profile,
    loads: Sequence[float],
    capacity: float,
    duration_s: float,
    seeds: Sequence[int],
    log_folder: Path,
) -> tuple[list[MeasuredRequest], dict[str, Any]]:
    """Run the mix for each seed at each load. Return every request, and the runs' provenance.

    Raises `MeasureError` if a run is too short to tell how fast the machine was.
    """
    service = RealEngines(NUM_ENGINES, {"engine": {"step_log": str(log_folder)}})
    found: list[MeasuredRequest] = []
    runs: list[dict[str, Any]] = []
    async with service:
        model = await service.model()
        await service.switch(OURS)
        await _send(service, model, 0.5 * capacity, 15.0, f"{seeds[0]} warm-up")
        for seed, load in itertools.product(seeds, loads):
            rate = load * capacity
            num_prompt_before, _ = await service.prompt_tokens()
            begin_s = time.monotonic()
            samples = await _send(service, model, rate, duration_s, f"{seed} {load}")
            num_prompt, _ = await service.prompt_tokens()
            state = await service.state()
            num_text = sum(sample.num_text_tokens for sample in samples)
            steps = logged_steps.steps(logged_steps.read_all(log_folder), begin_s)
            try:
                factors = fit_step_time_factors(profile, steps)
            except ValueError as error:
                raise MeasureError(f"{error}: raise --duration") from error
            found += [MeasuredRequest(load, rate, seed, sample) for sample in samples]
            runs.append(
                {
                    "load": load,
                    "requests_per_s": rate,
                    "seed": seed,
                    "template_tokens": (num_prompt - num_prompt_before - num_text) / len(samples),
                    "step_models": [
                        msgspec.to_builtins(each.step_model) for each in state.replicas.values()
                    ],
                    "pace": asdict(factors),
                }
            )
            print_progress(
                f"seed {seed}, {load:.0%}: {len(samples)} requests; the machine took "
                f"{factors.memory:.2f} times as long as the profile says to read weights and KV "
                f"cache, and {factors.compute:.2f} times for what each token adds"
            )
        replicas = (await service.state()).replicas.values()
        infos = [msgspec.to_builtins(each.info) for each in replicas]
    return found, {"model": model, "engines": infos, "runs": runs}


def write(measured: Sequence[MeasuredRequest], provenance: dict[str, Any], append: bool) -> None:
    """Write one line per request, and the provenance; with `append`, after those on disk."""
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
        provenance = {**provenance, "runs": read_provenance()["runs"] + provenance["runs"]}
    PROVENANCE.write_text(json.dumps(provenance, indent=1) + "\n")


def read_requests() -> list[MeasuredRequest]:
    """Return the requests that were written last."""
    with LINES.open(newline="") as file:
        found = []
        for row in csv.DictReader(file):
            load, rate, seed = float(row.pop("load")), float(row.pop("rate")), int(row.pop("seed"))
            values: dict[str, Any] = {name: text or None for name, text in row.items()}
            values |= {"completed": row["completed"] == "True", "error": row["error"]}
            sample = msgspec.convert(values, Sample, strict=False)
            found.append(MeasuredRequest(load, rate, seed, sample))
    return found


def read_provenance() -> dict[str, Any]:
    """Return what is known of the runs that were written last, their profile included."""
    return json.loads(PROVENANCE.read_text())


async def _send(
    service: RealEngines, model: str, rate: float, duration_s: float, seed: str
) -> list[Sample]:
    """Send a part of the mix, from idle to idle. Return its samples."""
    requests = MIX.arrivals(rate, duration_s, seed)
    arrivals = [(each.offset_s, MIX.api_request(each, model, seed)) for each in requests]
    async with Client(service.urls) as client:
        await client.connect(_NUM_CONNECTIONS)
        records = await open_loop(client, arrivals, _TIMEOUT_S)
    await service.wait_until_idle()
    return [
        Sample.of(0, OURS, request, record)
        for request, record in zip(requests, records, strict=True)
    ]
