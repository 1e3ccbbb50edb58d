"""How many engines: the search, and the command line."""

import pytest
from rich.console import Console
from typer.testing import CliRunner

from router.simulation.engine.profile import Profile
from router.simulation.figures import Slo
from serving.capacity.profiles import save_profile
from serving.capacity.whatif import Question, Search, WhatIfError, answer
from serving.cli.main import main
from serving.config import renamed


@pytest.mark.parametrize("enough", [1, 2, 3, 7, 8, 9, 100])
@pytest.mark.parametrize("start", [None, 1, 5, 64])
def test_search(enough, start):
    """It finds the fewest that meet the targets, whatever number it starts with."""
    search = Search(max_engines=128)
    number = start or search.next()
    while number is not None:
        search.record_result(number, {}, number >= enough)
        number = search.next()
    assert search.enough == enough
    assert len(search.tried) <= 15


def test_search_in_vain():
    search = Search(max_engines=10)
    while (number := search.next()) is not None:
        search.record_result(number, {}, met=False)
    assert search.enough is None
    assert max(search.tried) == 10


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "slow.yaml"
    profile = Profile(
        name="slow",
        model="small",
        device="none",
        source="Made up.",
        max_model_len=40_000,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        num_kv_tokens=100_000,
        base_s=0.01,
        s_per_token=1e-4,
    )
    save_profile(profile, path)
    return path


def test_answer(profile):
    """More traffic needs more engines; the answer says that it is simulated."""
    console = Console(record=True, width=120)

    def num_engines(rate):
        question = Question(
            profile=str(profile),
            trace="poisson",
            slo=Slo(8.0, 0.5),
            percentile=90,
            variants=("headway", "round_robin"),
            rate=rate,
            num_requests=400,
        )
        return {name: found.enough for name, found in answer(question, console).items()}

    few, many = num_engines(2.0), num_engines(30.0)
    assert all(0 < few[name] < many[name] for name in few)
    assert few.keys() == {"headway", "round_robin"}
    text = console.export_text()
    assert "Simulated, not measured: profile slow" in text
    assert f"headway: {many['headway']} engines" in text


def test_an_old_name_of_a_part_stays_the_label(profile, caplog):
    """With one warning, though every simulated run reads it."""
    renamed._warn_once.cache_clear()
    question = Question(
        profile=str(profile),
        trace="poisson",
        slo=Slo(8.0, 0.5),
        percentile=90,
        variants=("headway:externality", "headway:congestion_cost"),
        rate=2.0,
        num_requests=100,
    )
    found = answer(question, Console(record=True))
    assert list(found) == ["headway:externality", "headway:congestion_cost"]
    old, new = found.values()
    assert (old.enough, old.tried) == (new.enough, new.tried)
    lines = [each.getMessage() for each in caplog.records if each.name == "serving.config.renamed"]
    assert lines == [
        "externality is now called congestion_cost; the next release drops the old name"
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trace": "none.csv"}, "none.csv: cannot be read"),
        ({"profile": "none"}, "profile none"),
        ({"variants": ("best",)}, "unknown policy 'best'"),
    ],
)
def test_bad_question(profile, changes, reason):
    fields = {"profile": str(profile), "trace": "poisson", "slo": Slo(1.0)} | changes
    with pytest.raises(WhatIfError, match=reason):
        answer(Question(**fields), Console())


def test_command_line(profile):
    """Options in, table out; what is wrong is said in a line."""
    arguments = ["whatif", "--profile", str(profile), "--trace", "bursty", "--slo-ttft", "9"]
    arguments += ["--slo-tpot", "1", "--policy", "least_requests", "--requests", "200"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "least_requests: " in result.output
    assert "Simulated" in result.output

    result = CliRunner().invoke(main, [*arguments, "--percentile", "75"])
    assert result.exit_code == 2
    assert "--percentile 75: one of 50, 90, 99" in result.output

    result = CliRunner().invoke(main, [*arguments, "--trace", "none.csv"])
    assert result.exit_code == 2
    assert "none.csv: cannot be read" in result.output
