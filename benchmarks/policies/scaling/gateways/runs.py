"""One simulated run: so many engines, gateways and requests, and what became of them."""

import time
from dataclasses import dataclass

import numpy as np

from router.simulation.events import Network
from router.simulation.figures import WARM
from router.simulation.workload.synthetic import SYNTHETIC
from router.types import SNAPSHOT_INTERVAL_S
from serving.capacity.profiles import load_profile
from serving.capacity.sweep import Fleet, simulate

PROFILE = "h100-llama8b"
# As it was: others' bookings come with the next snapshot, and engines take whatever is sent.
WITHOUT = {"booking_interval_s": SNAPSHOT_INTERVAL_S, "gate": False}
HOWS: dict[str, dict[str, float | bool]] = {
    "as shipped": {},
    "without the gate": {"gate": False},
    "without both": WITHOUT,
}


@dataclass(frozen=True)
class Case:
    """One run to make. `how`: a key of `HOWS`."""

    workload: str
    num_engines: int
    num_gateways: int
    requests_per_engine: int
    rate_per_engine: float  # per second
    seed: int
    how: str = "as shipped"


def run(case: Case) -> dict[str, float]:
    """Simulate a case; return times to first token, ms, the shares of hits, and what it took, s."""
    began_s, cpu_s = time.monotonic(), time.process_time()
    profile = load_profile(PROFILE)
    num_requests = case.requests_per_engine * case.num_engines
    rate = case.rate_per_engine * case.num_engines
    workload = SYNTHETIC[case.workload](num_requests, case.seed).at_rate(rate)
    network = Network(submit_s=profile.path_s, **HOWS[case.how])  # type: ignore[arg-type]
    fleet = Fleet(profile, case.num_engines, case.num_gateways, network)
    result = simulate(workload, fleet, "headway", seed=case.seed)
    warm = slice(*(int(share * len(result)) for share in WARM))
    ttft_ms = 1000.0 * result.ttft_s[warm]
    prompts = result.num_prompt_tokens[warm]
    is_short = prompts <= np.median(prompts)
    return {
        "ttft_p50_ms": float(np.nanpercentile(ttft_ms, 50)),
        "ttft_p99_ms": float(np.nanpercentile(ttft_ms, 99)),
        "ttft_mean_ms": float(np.nanmean(ttft_ms)),
        "short_ttft_p99_ms": float(np.nanpercentile(ttft_ms[is_short], 99)),
        "completed": float(result.completed.mean()),
        "hit_share": float(result.num_cached_tokens[warm].sum() / prompts.sum()),
        "wall_s": time.monotonic() - began_s,
        "cpu_s": time.process_time() - cpu_s,
    }
