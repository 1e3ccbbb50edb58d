"""What do the judges of `make chaos` accept, and what not?"""

import random
from typing import Any

import pytest

from benchmarks.chaos.checks import check_probes, splice_gaps_s
from benchmarks.chaos.client import Question, Reply
from benchmarks.chaos.faults import ProcessFault, schedule_faults
from benchmarks.chaos.verdicts import VerdictKind, judge, questions
from router.resilience.breaker import BreakerEvent

QUESTION = Question("Why?", 4)
TIE = 0.25


def reply(*token_ids: int, **fields: Any) -> Reply:
    text = " ".join(map(str, token_ids))
    return Reply(QUESTION, text=text, token_ids=list(token_ids), prompt_ids=[7, 8], **fields)


class Model:
    """Continues a prefix by its `likeliest` tokens, given by log probability."""

    def __init__(self, likeliest: dict[tuple[int, ...], dict[int, float]]) -> None:
        self.likeliest = likeliest

    async def continue_from(self, token_ids: list[int], num_tokens: int) -> tuple[list, list]:
        said: list[int] = []
        tops = []
        for _ in range(num_tokens):
            top = self.likeliest.get(tuple(token_ids[2:] + said), {0: -0.1})
            tops.append(top)
            said.append(max(top, key=lambda token: top[token]))
        return said, tops


class TestJudge:
    async def test_the_same_is_equal(self):
        verdict = await judge(reply(1, 2, 3, 4), reply(1, 2, 3, 4), Model({}).continue_from, TIE)
        assert verdict.kind is VerdictKind.EQUAL

    @pytest.mark.parametrize(
        ("gap", "kind"), [(0.1, VerdictKind.NEAR_TIE), (0.5, VerdictKind.UNEXPLAINED)]
    )
    @pytest.mark.parametrize("sign", [1, -1])
    async def test_a_tie_that_fell_the_other_way_must_be_one(self, gap, kind, sign):
        model = Model({(1, 2): {3: -1.0, 9: -1.0 - sign * gap}, (1, 2, 9): {8: -0.1}})
        verdict = await judge(reply(1, 2, 9, 8), reply(1, 2, 3, 4), model.continue_from, TIE)
        assert (verdict.kind, verdict.first_difference) == (kind, 2)
        assert verdict.gap == pytest.approx(gap)

    async def test_what_follows_must_follow(self):
        """Else a token was lost or repeated."""
        model = Model({(1, 2): {3: -1.0, 9: -1.1}, (1, 2, 9): {8: -0.1, 7: -3.0}})
        verdict = await judge(reply(1, 2, 9, 7), reply(1, 2, 3, 4), model.continue_from, TIE)
        assert verdict.kind is VerdictKind.UNEXPLAINED

    async def test_a_further_tie_is_counted(self):
        model = Model({(1, 2): {3: -1.0, 9: -1.1}, (1, 2, 9): {8: -0.1, 7: -0.2}})
        verdict = await judge(reply(1, 2, 9, 7), reply(1, 2, 3, 4), model.continue_from, TIE)
        assert (verdict.kind, verdict.num_ties) == (VerdictKind.NEAR_TIE, 2)

    async def test_a_token_that_vllm_does_not_think_of_is_unexplained(self):
        model = Model({(1, 2): {3: -1.0}})
        verdict = await judge(reply(1, 2, 9, 7), reply(1, 2, 3, 4), model.continue_from, TIE)
        assert verdict.kind is VerdictKind.UNEXPLAINED

    async def test_a_reply_that_is_only_shorter_is_unexplained(self):
        verdict = await judge(reply(1, 2), reply(1, 2, 3, 4), Model({}).continue_from, TIE)
        assert verdict.kind is VerdictKind.UNEXPLAINED

    async def test_the_same_tokens_with_another_text_are_unexplained(self):
        other = reply(1, 2)
        other.text = "1 2 2"
        verdict = await judge(other, reply(1, 2), Model({}).continue_from, TIE)
        assert verdict.kind is VerdictKind.UNEXPLAINED


def events(*names: str) -> list[BreakerEvent]:
    return [
        BreakerEvent(at_s=float(at_s), breaker="r0", event=name) for at_s, name in enumerate(names)
    ]


@pytest.mark.parametrize(
    ("names", "num_half_open", "num_wrong"),
    [
        (("open", "half_open", "probe", "closed"), 1, 0),
        (("open", "half_open", "probe", "open", "half_open", "probe", "closed"), 2, 0),
        (("open", "half_open", "open"), 0, 0),  # open again before a probe
        (("open", "half_open", "probe", "probe", "closed"), 2, 1),
        (("open", "half_open", "closed"), 0, 1),
        (("open", "probe", "half_open", "probe", "closed"), 1, 1),
    ],
)
def test_exactly_one_probe_per_half_open(names, num_half_open, num_wrong):
    found, wrong = check_probes(events(*names))
    assert (found, len(wrong)) == (num_half_open, num_wrong)


def test_the_pause_after_a_fault_counts_without_the_usual_one():
    times_s = [0.0, 0.1, 0.2, 2.2, 2.3, 2.4]
    assert splice_gaps_s([reply(1, times_s=times_s)], [0.25], 2.0) == [pytest.approx(1.9)]
    assert splice_gaps_s([reply(1, times_s=times_s)], [5.0], 2.0) == []


def test_faults_are_as_many_as_asked_for_and_follow_from_the_seed():
    rounds = schedule_faults(10, 3, 4, random.Random(1))
    assert sorted(map(len, rounds)) == [1] * 8 + [2] * 3
    faults = [fault for each in rounds for fault in each]
    assert sum(fault.is_kill for fault in faults) == 10
    assert [faults.count(fault) for fault in ProcessFault] == [5, 5, 3, 1]
    assert (
        rounds
        == schedule_faults(10, 3, 4, random.Random(1))
        != schedule_faults(10, 3, 4, random.Random(2))
    )


def test_every_question_is_another_one_and_most_are_streamed():
    asked = questions()
    assert len({(question.text, question.is_chat) for question in asked}) == len(asked)
    assert sum(question.is_streamed for question in asked) > 0.8 * len(asked)


def test_a_reply_that_is_wrong_in_itself():
    whole = {
        "response_ids": {"a"},
        "dates": {1},
        "finish_reasons": ["length"],
        "usages": [{"completion_tokens": 4}],
    }
    assert reply(1, 2, 3, 4, **whole).fault() == ""
    assert reply(1, 2, 3, **whole).fault() == "3 tokens instead of 4"
    assert "more than one id" in reply(1, 2, 3, 4, **whole | {"response_ids": {"a", "b"}}).fault()
    assert "usages" in reply(1, 2, 3, 4, **whole | {"usages": [{"completion_tokens": 5}]}).fault()
    assert reply(error="cut").fault() == "cut"
