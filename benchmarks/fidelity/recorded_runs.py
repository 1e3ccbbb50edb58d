"""How far is the engine model off recorded vLLM runs? It replays them.

    python -m benchmarks.fidelity.recorded_runs FOLDER

For every run in the folder (`vllm_run`) all arrivals are replayed. A profile is fitted to one half
of the requests; the other half is judged by the means of the time to first token and of the
latency, measured and simulated. One engine, no router, no noise.
"""

import argparse
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from scipy.optimize import minimize

from benchmarks.fidelity.vllm_run import VllmRun, split_requests
from benchmarks.report import provenance
from router.simulation.engine.model import EngineModel
from router.simulation.engine.profile import Profile
from router.simulation.engine.sequence import Job
from serving.capacity.profiles import save_profile

_FITTED = ("base_s", "s_per_token", "s_per_decode_req", "s_per_context_token")
# The start of the search, seconds: a GPU that reads 16 GB of weights at 1.5 TB/s, prefills 15,000
# tokens/s, and reads 128 KiB of KV per token at the same bandwidth.
_START = (1e-2, 7e-5, 1e-5, 9e-8)
_MAX_REPLAYS = 500
# The first tries change each term by this factor.
_SPREAD = 1.6


@dataclass(frozen=True, slots=True)
class ReplayedTimes:
    """When a replayed request began and ended its output, seconds from its arrival."""

    ttft_s: float
    latency_s: float


def replay(run: VllmRun, profile: Profile) -> tuple[dict[str, ReplayedTimes], int]:
    """Replay the run on one modelled engine. Return each request's times and the preemptions."""
    engine = EngineModel(profile, random.Random(0), priority=False)
    arrivals = {request.id: request.arrival_s for request in run.requests}
    first_s: dict[str, float] = {}
    times: dict[str, ReplayedTimes] = {}
    coming = iter(run.requests)
    request = next(coming, None)
    while request is not None or engine.end_s is not None:
        end_s = engine.end_s
        if request is not None and (end_s is None or request.arrival_s < end_s):
            now_s = request.arrival_s
            engine.advance_to(now_s)
            engine.add(Job(request.id, request.num_prompt_tokens, request.num_output_tokens))
            engine.cut_run(now_s)
            request = next(coming, None)
        else:
            assert end_s is not None
            now_s = end_s
            for each in engine.end_step(now_s):
                first_s.setdefault(each.job_id, now_s)
                if each.finished:
                    arrival_s = arrivals[each.job_id]
                    ttft_s = first_s[each.job_id] - arrival_s
                    times[each.job_id] = ReplayedTimes(ttft_s, now_s - arrival_s)
        if engine.end_s is None:
            engine.begin_step(now_s, float("inf"))
    return times, engine.num_preemptions_total


def start_profile(run: VllmRun) -> Profile:
    """Return a profile with the run's limits, and the terms where the search starts."""
    longest = max(each.num_prompt_tokens + each.num_output_tokens for each in run.requests)
    return Profile(
        name=run.name,
        model=run.model,
        device=run.name,
        source="to be fitted",
        max_model_len=min(run.num_kv_tokens // run.block_size * run.block_size, 2 * longest),
        max_num_seqs=run.max_num_seqs,
        max_num_batched_tokens=run.max_num_batched_tokens,
        max_prefill_chunk=0,  # vLLM's default
        num_kv_tokens=run.num_kv_tokens,
        block_size=run.block_size,
        **dict(zip(_FITTED, _START, strict=True)),
    )


def fit_profile(run: VllmRun, ids: Iterable[str]) -> Profile:
    """Return the profile whose replay is closest to the requests `ids` of the run."""
    chosen = [request for request in run.requests if request.id in set(ids)]
    measured = np.array([[request.ttft_s, request.latency_s] for request in chosen])
    # Not relative to each request: the few that came to an empty engine would outweigh all others.
    scale = measured.mean(axis=0)
    start = start_profile(run)

    def distance(logarithms: np.ndarray) -> float:
        terms = dict(zip(_FITTED, map(float, np.exp(logarithms)), strict=True))
        times, _ = replay(run, start.model_copy(update=terms))
        simulated = np.array([[times[each.id].ttft_s, times[each.id].latency_s] for each in chosen])
        return float(np.sqrt(np.mean(((simulated - measured) / scale) ** 2)))

    corner = np.log(_START)
    simplex = np.vstack([corner, corner + np.log(_SPREAD) * np.eye(len(_FITTED))])
    options = {
        "maxfev": _MAX_REPLAYS,
        "xatol": 1e-3,
        "fatol": 1e-5,
        "initial_simplex": simplex,
    }
    best = minimize(distance, corner, method="Nelder-Mead", options=options)
    terms = {name: float(f"{np.exp(x):.4g}") for name, x in zip(_FITTED, best.x, strict=True)}
    source = (
        f"vLLM {run.vllm_version}, run {run.name}: fitted by replay to {len(chosen)} of "
        f"{len(run.requests)} requests."
    )
    return start.model_copy(update={**terms, "source": source})


def judge(run: VllmRun, profile: Profile, ids: Iterable[str]) -> dict[str, Any]:
    """Return the means over the requests `ids`, measured and simulated, seconds."""
    times, num_preemptions = replay(run, profile)
    chosen = [request for request in run.requests if request.id in set(ids)]
    result: dict[str, Any] = {
        "run": run.name,
        "num_requests": len(chosen),
        "num_preemptions_simulated": num_preemptions,
        "profile": profile.model_dump(),
    }
    for name in ("ttft_s", "latency_s"):
        measured = mean(getattr(request, name) for request in chosen)
        simulated = mean(getattr(times[request.id], name) for request in chosen)
        result[name] = {
            "measured": measured,
            "simulated": simulated,
            "error": simulated / measured - 1,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "folder", type=Path, help="with NAME_requests.jsonl.gz and the files beside it"
    )
    parser.add_argument("--profiles", type=Path, help="folder to write the profiles to")
    parser.add_argument("--out", type=Path, help="JSON file to write the result to")
    options = parser.parse_args()
    files = sorted(options.folder.glob("*_requests.jsonl.gz"))
    if not files:
        parser.error(f"{options.folder} has no *_requests.jsonl.gz")
    console = Console(highlight=False, width=110)
    table = Table("run", "judged", "mean of", "measured", "simulated", "error", "preemptions")
    results = []
    columns = (TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task("", total=None)
        for file in files:
            run = VllmRun.load(file)
            bars.update(bar, description=f"fitting {run.name}")
            fitted_on, judged_on = split_requests(run)
            profile = fit_profile(run, fitted_on)
            if options.profiles:
                save_profile(profile, options.profiles / f"{run.name}.yaml")
            result = judge(run, profile, judged_on)
            results.append(result)
            for name, title in (("ttft_s", "TTFT, s"), ("latency_s", "latency, s")):
                each = result[name]
                table.add_row(
                    run.name.removeprefix("vllm"),
                    str(result["num_requests"]),
                    title,
                    f"{each['measured']:.3f}",
                    f"{each['simulated']:.3f}",
                    f"{each['error']:+.1%}",
                    str(result["num_preemptions_simulated"]),
                )
    console.print(table)
    if options.out:
        document = {
            "what": "recorded vLLM runs (measured) against the engine model (simulated)",
            "commit": provenance.commit(),
            "results": results,
        }
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
