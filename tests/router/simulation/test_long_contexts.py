"""Prompts of up to 100,000 tokens that go on from one another, where routing has collapsed."""

import numpy as np

from router.simulation.workload.sessions import CodingAgents
from router.simulation.workload.workload import Workload
from serving.capacity.profiles import load_profile
from serving.capacity.sweep import Fleet, simulate

AGENTS = CodingAgents(mean_num_turns=16.0, tool_median_s=1.0)


def test_agents_find_their_contexts_again_and_nobody_is_refused():
    """When only 16,000 tokens of a prompt were looked at, half waited 6.8 s or longer; now 0.7 s.

    And when only engines were looked at that had room for all of a prompt, though most of it was
    there, 35 of 221 were refused.
    """
    workload = Workload.of("agents", AGENTS.arrivals(2.0, 16, 0)).at_rate(1.2)
    fleet = Fleet(load_profile("h100"), 2)
    ours, theirs = (
        simulate(workload, fleet, variant, seed=1) for variant in ("headway", "cache_aware@stock")
    )
    assert ours.completed.all()
    assert np.median(ours.ttft_s) < 2.0
    assert ours.num_cached_tokens.sum() >= 0.95 * theirs.num_cached_tokens.sum()
