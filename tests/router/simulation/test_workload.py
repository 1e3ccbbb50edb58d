"""Workloads: scaling, cutting, laying over one another, and what generators draw."""

import itertools
import math
import pickle
from collections import defaultdict

import numpy as np
import pytest

from router.simulation.figures import Promises, Slo
from router.simulation.workload import arrivals
from router.simulation.workload.lengths import BoundedPareto, LogNormal, Mixture
from router.simulation.workload.sessions import Conversations
from router.simulation.workload.synthetic import SYNTHETIC
from router.simulation.workload.workload import Arrival, Workload


def interarrival_cv(times_s):
    """Return the coefficient of variation of the gaps: 1 for Poisson, more where bursty."""
    gaps_s = np.diff(times_s)
    return gaps_s.std() / gaps_s.mean()


def make_workload(*sizes, gap_s=1.0):
    return Workload.of(
        "test",
        (
            Arrival(
                offset_s=5.0 + gap_s * number,
                num_prompt_tokens=prompt,
                num_output_tokens=output,
                prefix_ids=(1, 2),
                prefix_block_tokens=16,
            )
            for number, (prompt, output) in enumerate(sizes)
        ),
    )


def rng(seed=0):
    return np.random.default_rng(seed)


def test_scaled_to_a_rate():
    """Ten times the rate is a tenth of the time, and the scale says so."""
    workload = make_workload(*[(100, 10)] * 5)
    assert workload.rate == pytest.approx(1.0)
    faster = workload.at_rate(10.0)
    assert faster.rate == pytest.approx(10.0)
    assert [each.offset_s for each in faster.arrivals] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert faster.scale == pytest.approx(10.0)
    assert faster.at_rate(5.0).scale == pytest.approx(5.0)
    with pytest.raises(ValueError, match="all requests come at once"):
        workload.at_once().at_rate(1.0)


def test_too_long_for_the_engine():
    """Left out or cut, and counted."""
    workload = make_workload((100, 10), (990, 11), (2000, 800), (900, 100))
    dropped = workload.fitted(1000)
    assert [each.num_prompt_tokens for each in dropped.arrivals] == [100, 900]
    assert (dropped.num_dropped, dropped.num_capped) == (2, 0)
    capped = workload.fitted(1000, "cap")
    sizes = [(each.num_prompt_tokens, each.num_output_tokens) for each in capped.arrivals]
    assert sizes == [(100, 10), (989, 11), (500, 500), (900, 100)]
    assert (capped.num_dropped, capped.num_capped) == (0, 2)
    assert workload.fitted(10_000) is workload
    with pytest.raises(ValueError, match="longer than max_model_len 50"):
        workload.fitted(50)


def test_overlaid():
    """As much at the same time from each copy; no copy knows another's prefixes."""
    workload = make_workload(*[(32, 10)] * 10)
    doubled = workload.overlaid(2)
    assert len(doubled) == 20
    assert doubled.rate == pytest.approx(2.0 * workload.rate, rel=0.1)
    assert len({each.block_hashes(16) for each in doubled.arrivals}) == 2
    assert doubled.num_copies == 2


def test_what_a_sweep_sends_to_its_processes_can_be_pickled():
    """In both forms of the core: classes that are frozen and compiled cannot by themselves."""
    workload = SYNTHETIC["conversations"](50, 0).at_rate(3.0).overlaid(2)
    again = pickle.loads(pickle.dumps(workload))
    assert again == workload
    assert again.describe() == workload.describe()
    for slo in (Slo(None, 0.1), Slo(2.0), Promises(4.0, 2.0)):
        assert pickle.loads(pickle.dumps(slo)) == slo


def test_drawn_at_its_own_speed():
    """Five copies of two requests a second are ten: no gap between one copy's requests changes."""
    base = Workload.of(
        "even",
        [
            Arrival(
                offset_s=0.5 * n,
                num_prompt_tokens=100 + n,
                num_output_tokens=1,
                prefix_ids=(n,),
                prefix_block_tokens=16,
            )
            for n in range(100)
        ],
    )
    drawn = base.drawn(10.0, 400, seed=1)
    assert (len(drawn), drawn.num_copies) == (400, 5)
    assert drawn.rate == pytest.approx(10.0)
    assert drawn.scale == pytest.approx(1.0)
    by_copy = defaultdict(list)
    for each in drawn.arrivals:
        by_copy[each.prefix_ids[0] & 0xFFFF].append(each)
    assert len(by_copy) > 5  # those that began anew are others
    for copy in by_copy.values():
        sizes = [each.num_prompt_tokens for each in copy]
        assert np.all(np.diff(sizes) == 1)
        assert np.diff([each.offset_s for each in copy]) == pytest.approx(0.5, rel=0.05)
    assert drawn.arrivals == base.drawn(10.0, 400, seed=1).arrivals
    assert drawn.arrivals != base.drawn(10.0, 400, seed=2).arrivals


def test_drawn_as_one_copy_is_the_trace_made_faster():
    base = Workload.of(
        "even",
        [Arrival(offset_s=float(n), num_prompt_tokens=1, num_output_tokens=1) for n in range(50)],
    )
    drawn = base.drawn(10.0, 120, seed=1, num_copies=1)
    assert (len(drawn), drawn.num_copies) == (120, 1)
    assert drawn.scale == pytest.approx(10.0)
    assert np.diff([each.offset_s for each in drawn.arrivals]) == pytest.approx(0.1)


def test_parts():
    workload = make_workload(*[(size, 1) for size in range(1, 11)])
    assert [each.num_prompt_tokens for each in workload.part(1, 4).arrivals] == [5, 6, 7, 8]
    assert workload.part(1, 4).arrivals[0].offset_s == 0.0
    assert workload.part(2, 4) == workload.part(0, 4)  # there are but two whole parts
    assert len(workload.part(3, 100)) == 10


def test_no_requests():
    with pytest.raises(ValueError, match="test: no requests"):
        make_workload()


@pytest.mark.parametrize(("cv", "tolerance"), [(1.0, 0.05), (4.0, 0.15)])
def test_bursty(cv, tolerance):
    times_s = arrivals.bursty(rng(), 5.0, cv, 20_000)
    assert interarrival_cv(times_s) == pytest.approx(cv, rel=tolerance)
    assert len(times_s) / times_s[-1] == pytest.approx(5.0, rel=tolerance)


def test_poisson():
    times_s = arrivals.poisson(rng(), 5.0, 20_000)
    assert interarrival_cv(times_s) == pytest.approx(1.0, rel=0.05)
    assert len(times_s) / times_s[-1] == pytest.approx(5.0, rel=0.05)


def test_ramp():
    """From 0 to 20/s: the second half has three times the first's arrivals."""
    times_s = arrivals.ramp(rng(), 0.0, 20.0, 1000.0)
    assert len(times_s) == pytest.approx(10_000, rel=0.05)
    assert (times_s > 500.0).sum() / (times_s <= 500.0).sum() == pytest.approx(3.0, rel=0.1)


def test_spike():
    times_s = arrivals.spike(rng(), 10.0, 5.0, 100.0, 1000.0)
    inside = ((times_s >= 450.0) & (times_s < 550.0)).sum()
    assert inside == pytest.approx(5_000, rel=0.05)
    assert len(times_s) - inside == pytest.approx(9_000, rel=0.05)


def test_profile_that_goes_back():
    with pytest.raises(ValueError, match="ascends"):
        arrivals.varying(rng(), [(0.0, 1.0), (5.0, 1.0), (4.0, 1.0)])


def test_lognormal():
    counts = LogNormal(100.0, 1.0, high=1000).draw(rng(), 20_000)
    assert np.median(counts) == pytest.approx(100, rel=0.05)
    assert np.log(counts[counts < 1000]).std() == pytest.approx(1.0, rel=0.05)
    assert (counts.min() >= 1, counts.max()) == (True, 1000)


def test_pareto():
    """One in ten is ten times the least at alpha 1; all within the bounds."""
    counts = BoundedPareto(10, 100_000, alpha=1.0).draw(rng(), 50_000)
    assert (counts >= 100).mean() == pytest.approx(0.1, rel=0.1)
    assert counts.min() >= 10
    assert counts.max() <= 100_000


def test_mixture():
    kinds = (LogNormal(10.0, 0.1), LogNormal(1000.0, 0.1))
    counts = Mixture(kinds, (3.0, 1.0)).draw(rng(), 10_000)
    assert (counts > 100).mean() == pytest.approx(0.25, abs=0.02)


def test_conversations():
    """Each turn's prompt is longer by more than the reply before it; groups share a prompt."""
    arrivals = list(Conversations(num_groups=2).arrivals(1.0, 200, seed=0))
    sessions = {each.session: [] for each in arrivals}
    for arrival in arrivals:
        sessions[arrival.session].append(arrival)
    assert len(arrivals) / len(sessions) == pytest.approx(4.0, rel=0.2)
    for turns in sessions.values():
        for before, after in itertools.pairwise(turns):
            assert after.offset_s > before.offset_s
            assert after.num_prompt_tokens > before.num_prompt_tokens + before.num_output_tokens
            known = before.block_hashes(64, with_reply=True)
            assert after.block_hashes(64)[: len(known)] == known
    assert len({turns[0].block_hashes(16)[:50] for turns in sessions.values()}) == 2
    assert len({turns[0].block_hashes(16) for turns in sessions.values()}) > 100


@pytest.mark.parametrize("name", SYNTHETIC)
def test_synthetic(name):
    """About as many as asked for, in order, and the same ones for the same seed."""
    workload = SYNTHETIC[name](2000, 3)
    assert len(workload) == pytest.approx(2000, rel=0.25)
    offsets_s = [each.offset_s for each in workload.arrivals]
    assert offsets_s == sorted(offsets_s)
    assert workload == SYNTHETIC[name](2000, 3)
    assert workload != SYNTHETIC[name](2000, 4)
    assert math.isfinite(workload.rate)
