"""The simulator: every request ends once, whatever breaks; equal seeds, equal runs."""

import numpy as np
import pytest

from router.core.settings import RouterSettings
from router.fleet.step_budget import ITL_TARGET_S
from router.scheduling.ablation import PARTS
from router.scheduling.policies import POLICIES
from router.simulation.engine.model import EngineModel
from router.simulation.engine.profile import Profile, StepTimeFactors
from router.simulation.events import NeedsSnapshots, Network
from router.simulation.simulator import Failure, Simulation, can_do_without_snapshots
from router.simulation.variant import ablations, policies, renamed, split
from router.simulation.workload.synthetic import SYNTHETIC
from router.types import Outcome
from serving.capacity.sweep import Fleet, simulate, simulated_capacity

PROFILE = Profile(
    name="test",
    model="small",
    device="none",
    source="made up",
    max_model_len=32_000,
    max_num_seqs=64,
    max_num_batched_tokens=2048,
    num_kv_tokens=64_000,
    base_s=0.005,
    s_per_token=2e-5,
    s_per_decode_req=1e-5,
    s_per_context_token=1e-8,
    noise=0.05,
)
WORKLOAD = SYNTHETIC["conversations"](400, 0).at_rate(30.0)
BURSTY = SYNTHETIC["bursty"](200, 0).at_rate(150.0)


def simulation(workload=WORKLOAD, num_engines=3, policy="headway", **options):
    settings = RouterSettings(
        policy=policy,
        max_hold_s=options.pop("max_hold_s", 300.0),
        hedge_factor=options.pop("hedge_factor", None),
    )
    return Simulation(
        workload,
        settings,
        lambda rng: EngineModel(PROFILE, rng, itl_target_s=ITL_TARGET_S),
        num_engines,
        **options,
    )


def num_retries(gateway, now_s: float) -> int:
    return gateway.router.state(now_s).retries.num_made


def assert_each_ended_once(simulation, run):
    """One outcome each, the same ones that the routers counted, and nothing left behind."""
    assert (run.outcome >= 0).all()
    for outcome in Outcome:
        counted = sum(gateway.router.outcomes[outcome] for gateway in simulation.gateways)
        assert run.has(outcome).sum() == counted
    for gateway in simulation.gateways:
        state = gateway.router.state(simulation.now_s)
        assert state.num_placed == state.held.num_requests == 0
        for replica in state.replicas.values():
            assert replica.ledger.num_open == 0


@pytest.mark.parametrize("variant", [*policies(), *ablations(), "clairvoyant"])
def test_all_policies(variant):
    """All complete, first token before last, and no engine serves what was not sent to it."""
    run = simulate(WORKLOAD, Fleet(PROFILE, 3), variant)
    assert run.completed.all()
    assert (run.ttft_s > 0.0).all()
    assert (run.e2e_s >= run.ttft_s).all()
    assert (run.hold_s >= 0.0).all()
    assert (run.hold_s <= run.ttft_s).all()
    assert 0 < run.num_cached_tokens.sum() < run.num_prompt_tokens.sum()


def test_variants_are_those_of_the_settings():
    assert sorted(policies()) == sorted(POLICIES)
    assert [split(name) for name in ablations()] == [("headway", (part,)) for part in PARTS]
    with pytest.raises(ValueError, match="unknown policy 'best'"):
        split("best")
    with pytest.raises(ValueError, match="unknown part 'luck'"):
        split("headway:luck")


def test_an_old_name_of_a_part_is_that_part():
    """Results keep the label as it was given."""
    assert split("headway:hold,externality") == ("headway", ("hold", "congestion_cost"))
    assert renamed("headway:hold,externality") == {"externality": "congestion_cost"}
    assert renamed("headway:hold") == renamed("round_robin") == {}
    for variant in ("headway:externality,congestion_cost", "headway:congestion_cost,externality"):
        with pytest.raises(ValueError, match="externality is the old name of congestion_cost"):
            split(variant)
    old, new, whole = (
        simulate(WORKLOAD.part(0, 100), Fleet(PROFILE, 3), variant)
        for variant in ("headway:externality", "headway:congestion_cost", "headway")
    )
    for column in COLUMNS:
        assert np.array_equal(getattr(old, column), getattr(new, column))
    assert not np.array_equal(old.first_s, whole.first_s)


@pytest.mark.parametrize("policy", ["headway", "power_of_two"])
def test_equal_seeds(policy):
    """Request by request; another seed gives another run."""
    one, same, other = (
        simulation(policy=policy, num_gateways=2, seed=seed).run() for seed in (1, 1, 2)
    )
    for column in (*COLUMNS, "gaps_s"):
        assert np.array_equal(getattr(one, column), getattr(same, column))
    assert not np.array_equal(one.end_s, other.end_s)


COLUMNS = ("placed_s", "first_s", "end_s", "outcome", "num_cached_tokens")


@pytest.mark.parametrize("policy", ["headway", "round_robin", "least_response_time"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_gateways": 2},
        {"network": Network(snapshot_loss=0.3)},
        {"hedge_factor": 1.2},
        {"failures": [Failure(0, 1.0, 3.0), Failure(1, 2.0, 1.0)]},
        {"workload": BURSTY, "num_engines": 2},
        {"workload": SYNTHETIC["poisson"](300, 0).at_rate(100.0), "num_engines": 1},
    ],
)
def test_running_ahead_changes_nothing(policy, options):
    """Runs of steps, snapshots delivered only when needed: the same as in single steps."""
    options = {"workload": SYNTHETIC["conversations"](150, 0).at_rate(30.0)} | options
    ahead, eager = (simulation(policy=policy, eager=eager, **options) for eager in (False, True))
    one, other = ahead.run(), eager.run()
    for column in COLUMNS:
        assert np.array_equal(getattr(one, column), getattr(other, column), equal_nan=True)
    assert np.array_equal(np.sort(one.gaps_s), np.sort(other.gaps_s))
    assert one.num_events < other.num_events


@pytest.mark.parametrize(
    "policy", [name for name in policies() if not POLICIES[name].reads_engines]
)
@pytest.mark.parametrize(
    "options", [{}, {"num_gateways": 2}, {"workload": BURSTY, "num_engines": 2}]
)
def test_doing_without_snapshots_changes_nothing(policy, options):
    """Of policies that do not read what engines report: heartbeats alone give the same run."""
    assert can_do_without_snapshots(RouterSettings(policy=policy))
    options = {"workload": SYNTHETIC["conversations"](150, 0).at_rate(30.0)} | options
    without, eager = (
        simulation(policy=policy, **how, **options) for how in ({"reports": False}, {"eager": True})
    )
    one, other = without.run(), eager.run()
    for column in COLUMNS:
        assert np.array_equal(getattr(one, column), getattr(other, column), equal_nan=True)
    assert np.array_equal(np.sort(one.gaps_s), np.sort(other.gaps_s))
    assert one.num_events < other.num_events


@pytest.mark.parametrize(
    "changes", [{"policy": "headway"}, {"policy": "weighted_score"}, {"hold": True}]
)
def test_whoever_reads_engines_needs_their_snapshots(changes):
    assert not can_do_without_snapshots(RouterSettings(**{"policy": "round_robin"} | changes))


def test_a_run_that_needs_snapshots_says_so():
    """First tokens far too late, or a step that takes for ever: its breakers may open."""
    flood = SYNTHETIC["poisson"](400, 0).at_rate(400.0)
    with pytest.raises(NeedsSnapshots):
        simulation(workload=flood, policy="round_robin", reports=False).run()
    slow = Simulation(
        WORKLOAD,
        RouterSettings(policy="round_robin"),
        lambda rng: EngineModel(PROFILE.slowed(StepTimeFactors(500.0, 500.0)), rng),
        2,
        reports=False,
    )
    with pytest.raises(NeedsSnapshots):
        slow.run()


@pytest.mark.parametrize("policy", policies())
def test_lost_snapshots(policy):
    """Half of all snapshots lost: heartbeats heal what a gateway missed."""
    lossy = simulation(policy=policy, network=Network(snapshot_loss=0.5), seed=3)
    run = lossy.run()
    assert run.completed.all()
    assert_each_ended_once(lossy, run)


@pytest.mark.parametrize("policy", policies())
@pytest.mark.parametrize("num_gateways", [1, 2])
def test_failing_engines(policy, num_gateways):
    """What had begun goes on elsewhere, and no token comes twice.

    All complete, but who by chance is on two engines in a row that fail, alone on the second.
    """
    failures = [Failure(0, 2.0, 5.0), Failure(1, 2.0, 1.0), Failure(0, 8.0, 3.0)]
    failing = simulation(policy=policy, num_gateways=num_gateways, failures=failures)
    run = failing.run()
    assert_each_ended_once(failing, run)
    refused = run.has(Outcome.REJECTED) | run.has(Outcome.FAILED)
    assert (run.completed | refused).all()
    assert refused.sum() <= 1
    assert sum(num_retries(gateway, failing.now_s) for gateway in failing.gateways) > 10
    undisturbed = simulation(policy=policy, num_gateways=num_gateways).run()
    assert np.nanmedian(run.e2e_s) > np.median(undisturbed.e2e_s)


def test_all_engines_down_for_longer_than_a_hold():
    """With no engine to send to, requests wait and expire."""
    failures = [Failure(0, 1.0, 8.0), Failure(0, 1.0, 8.0)]
    down = simulation(num_engines=2, failures=failures, max_hold_s=3.0)
    run = down.run()
    assert_each_ended_once(down, run)
    expired = run.has(Outcome.EXPIRED)
    assert expired.sum() > 50
    new = expired & (run.arrival_s > 1.0)  # the others count from when their engine died
    assert run.end_s[new] - run.arrival_s[new] == pytest.approx(3.0)


class Scaler:
    """Two engines, then four, then one."""

    interval_s = 1.0
    chooses = False

    def __init__(self):
        self.seen = []

    def num_wanted(self, simulation, num_starting):
        self.seen.append(len(simulation.working_nodes))
        return 4 if 5.0 <= simulation.now_s < 12.0 else 1 if simulation.now_s >= 12.0 else 2


def test_scaling():
    """New engines need time to start; drained engines complete their jobs."""
    scaler = Scaler()
    scaled = simulation(num_engines=2, scaler=scaler, start_s=2.5)
    run = scaled.run()
    assert run.completed.all()
    assert_each_ended_once(scaled, run)
    assert scaler.seen[:12] == [2, 2, 2, 2, 2, 2, 2, 4, 4, 4, 4, 4]
    assert scaler.seen[12] == 1
    assert len(scaled.nodes) == 1


def test_capacity():
    """Twice the engines, twice the rate; below it requests wait little, above it without end."""
    workload = SYNTHETIC["poisson"](1500, 0)
    rate = simulated_capacity(workload, Fleet(PROFILE, 2))
    assert simulated_capacity(workload, Fleet(PROFILE, 4)) == pytest.approx(2.0 * rate, rel=0.1)
    below = simulate(workload.at_rate(0.7 * rate), Fleet(PROFILE, 2), "least_requests")
    above = simulate(workload.at_rate(1.5 * rate), Fleet(PROFILE, 2), "least_requests")
    assert np.median(below.ttft_s) * 5.0 < np.median(above.ttft_s)


def test_contention():
    """Engines that step at the same time slow each other down; one alone is not slowed."""
    workload = SYNTHETIC["poisson"](200, 0).at_rate(20.0)

    def step_s(num_engines, contention):
        return np.median(simulation(workload, num_engines, contention=contention).run().gaps_s)

    assert step_s(1, 0.5) == step_s(1, 0.0)
    assert 1.2 < step_s(2, 0.5) / step_s(2, 0.0) < 1.6
