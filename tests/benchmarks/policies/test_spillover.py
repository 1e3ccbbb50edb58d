"""Providers in the simulator: what spills, and that no request is lost or refused."""

import argparse

import pytest

from benchmarks.policies import spillover
from router.providers.settings import FallbackSettings
from serving.capacity.profiles import load_profile

PROFILE = load_profile("h100-llama8b")


def simulate(spill_when: str | None, rpm: int = 600) -> dict[str, float]:
    fallback = FallbackSettings(spill=spill_when) if spill_when else None
    workload = spillover.spike_workload("code", 800, 0, PROFILE).at_rate(60.0)
    options = argparse.Namespace(rpm=rpm, tpm=1_000_000)
    return spillover.simulate_spilling(workload, PROFILE, 2, {}, fallback, options, 0)


def test_spilling_by_the_predicted_wait_gives_more_goodput_than_never_spilling():
    never, late = simulate(None), simulate("late")
    assert never["cost"] == never["spilled"] == 0
    assert late["goodput"] > never["goodput"] + 0.05
    assert late["cost"] > 0
    assert late["refused"] == late["shed"] == 0


@pytest.mark.parametrize("spill_when", ["full", "unavailable"])
def test_without_the_reason_nothing_spills(spill_when):
    assert simulate(spill_when)["spilled"] == 0


def test_a_scarce_provider_is_not_overrun_in_a_spike():
    scarce = simulate("late", rpm=60)
    assert scarce["refused"] == 0
    assert 0 < scarce["spilled"] < simulate("late")["spilled"]
