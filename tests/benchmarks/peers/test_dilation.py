"""A machine whose CPU does not count: all that is not CPU time takes longer, by one factor."""

import dataclasses

import pytest

from benchmarks.peers.dilation import (
    dilated_arrivals,
    dilated_profile,
    dilated_targets,
    undilated_sample,
)
from benchmarks.peers.scenario import Scenario
from benchmarks.report.latency import Sample
from router import RouterSettings
from serving.capacity.profiles import load_profile
from serving.config import parse

SCENARIO = Scenario(
    peers=(),
    rival_engines=("ours", "stock"),
    profile="h100-llama8b",
    num_engines=8,
    rate=70.0,
    duration_s=15.0,
    num_repeats=1,
    seed=0,
    one_policy=True,
    dilation=4.0,
    max_tries=1,
)


@pytest.mark.parametrize("shape", [(0, 1, 100, 0.0), (8192, 0, 0, 1e6), (1024, 64, 40_000, 5e5)])
def test_every_step_takes_so_many_times_as_long(shape) -> None:
    profile = load_profile("h100-llama8b")
    dilated_s = dilated_profile(profile, 4.0).step_cost.step_s(*shape)
    assert dilated_s == pytest.approx(4 * profile.step_cost.step_s(*shape))


def test_arrivals_and_times_are_those_of_the_profile() -> None:
    requests = SCENARIO.mix.arrivals(70.0, 2.0, "seed")
    dilated = dilated_arrivals(requests, 4.0)
    assert [each.offset_s for each in dilated] == [4 * each.offset_s for each in requests]
    assert [each.num_text_tokens for each in dilated] == [each.num_text_tokens for each in requests]
    sample = Sample(0, "p", 0, "short", 8, 4.0, 0.2, 1.0, 5, completed=True)
    undilated = undilated_sample(sample, 4.0)
    assert (undilated.due_s, undilated.ttft_s, undilated.e2e_s) == (1.0, 0.05, 0.25)
    assert undilated.tpot_s == pytest.approx(sample.tpot_s / 4)
    lost = dataclasses.replace(sample, ttft_s=None, e2e_s=None, completed=False)
    assert undilated_sample(lost, 4.0).ttft_s is None


def test_headway_and_peers_get_the_same_engines(tmp_path) -> None:
    fleets, ours = SCENARIO.make_systems(tmp_path, 0)
    args = parse(ours.config(8000, 8001)["applications"][0]["args"])
    path = args.engine.args["profile"]
    assert load_profile(path).base_s == pytest.approx(4 * load_profile("h100-llama8b").base_s)
    assert {fleet._profile for fleet in fleets.values()} == {path}
    assert list(fleets) == ["ours", "stock"]
    usual = RouterSettings()
    assert args.router.ttft_target_base_s == 4 * usual.ttft_target_base_s
    assert dilated_targets(1.0).items() <= usual.model_dump().items()


def test_without_dilation_nothing_is_written(tmp_path) -> None:
    scenario = dataclasses.replace(SCENARIO, dilation=1.0)
    _, ours = scenario.make_systems(tmp_path, 0)
    args = parse(ours.config(8000, 8001)["applications"][0]["args"])
    assert args.engine.args == {"profile": "h100-llama8b"}
    assert args.router == RouterSettings()
    assert list(tmp_path.iterdir()) == []
    assert (scenario.name, SCENARIO.name) == ("peers-emulated", "peers-emulated-dilated")
