"""What would a machine show whose CPU no longer counts? Everything but the CPU takes longer.

Steps of emulated engines, arrivals and the router's targets take `factor` times as long, and times
are divided by it afterwards. So CPU time weighs `factor` times less, and what is left of a
difference between two systems is routing. Not dilated are the 10 ms between two snapshots of an
engine and the 20 ms in which the router reckons to react: relative to steps they are shorter.
"""

from dataclasses import replace
from typing import Any

from benchmarks.load.mix import MixRequest
from benchmarks.report.latency import Sample
from router import RouterSettings
from router.simulation.engine.profile import Profile, StepTimeFactors

_TARGETS = ("ttft_target_base_s", "ttft_target_s_per_token", "ttft_target_batch_s", "max_late_s")


def dilated_profile(profile: Profile, factor: float) -> Profile:
    """Return an engine whose steps take `factor` times as long."""
    return profile.slowed(StepTimeFactors(memory=factor, compute=factor))


def dilated_targets(factor: float) -> dict[str, Any]:
    """Return the router's settings of which request is due when."""
    settings = RouterSettings().model_dump()
    return {key: factor * settings[key] for key in _TARGETS}


def dilated_arrivals(requests: list[MixRequest], factor: float) -> list[MixRequest]:
    """Return the same requests, sent `factor` times as far apart."""
    return [replace(request, offset_s=factor * request.offset_s) for request in requests]


def undilated_sample(sample: Sample, factor: float) -> Sample:
    """Return what one request took, in the time of the profile that was not dilated."""
    return replace(
        sample,
        due_s=sample.due_s / factor,
        ttft_s=None if sample.ttft_s is None else sample.ttft_s / factor,
        e2e_s=None if sample.e2e_s is None else sample.e2e_s / factor,
    )
