"""The judges of `make chaos`: what they let pass and what they do not."""

import random
from typing import Any

import pytest

from benchmarks.chaos_check import probe_faults, seam_gaps_s
from benchmarks.chaos_client import Question, Reply
from benchmarks.chaos_faults import Fault, schedule
from benchmarks.chaos_texts import Kind, gaps_of, judge, questions

QUESTION = Question("Why?", 4)
TIE = 0.25


def reply(*token_ids: int, **fields: Any) -> Reply:
    text = " ".join(map(str, token_ids))
    return Reply(QUESTION, text=text, token_ids=list(token_ids), prompt_ids=[7, 8], **fields)


class TestJudge:
    def test_the_same_is_equal_and_needs_no_look_at_vllm(self):
        assert judge(reply(1, 2, 3, 4), reply(1, 2, 3, 4), None, TIE).kind is Kind.EQUAL

    def test_a_turned_near_tie_and_what_follows_from_it(self):
        verdict = judge(reply(1, 2, 9, 8), reply(1, 2, 3, 4), [0.0, 0.0, 0.1, 0.0], TIE)
        assert verdict.kind is Kind.NEAR_TIE
        assert (verdict.first_difference, verdict.gap, verdict.widest_gap) == (2, 0.1, 0.1)

    @pytest.mark.parametrize(
        "own_gaps",
        [
            [0.0, 0.0, 0.5, 0.0],  # the token there is not what vLLM would choose
            [0.0, 0.0, 0.1, 3.0],  # nor is a later one, given the first: lost or repeated tokens
            [0.4, 0.0, 0.0, 0.0],
            None,
        ],
    )
    def test_anything_else_is_unexplained(self, own_gaps):
        verdict = judge(reply(1, 2, 9, 8), reply(1, 2, 3, 4), own_gaps, TIE)
        assert verdict.kind is Kind.UNEXPLAINED

    def test_a_reply_that_is_only_shorter_is_unexplained(self):
        verdict = judge(reply(1, 2), reply(1, 2, 3, 4), [0.0, 0.0], TIE)
        assert verdict.kind is Kind.UNEXPLAINED

    def test_the_same_tokens_with_another_text_are_unexplained(self):
        other = reply(1, 2)
        other.text = "1 2 2"
        assert judge(other, reply(1, 2), [0.0, 0.0], TIE).kind is Kind.UNEXPLAINED

    def test_gaps_are_taken_from_the_first_ranked(self):
        per_token = [
            {"5": {"logprob": -0.1, "rank": 1}},
            {"6": {"logprob": -1.5, "rank": 2}, "9": {"logprob": -1.25, "rank": 1}},
        ]
        assert gaps_of(per_token, [5, 6]) == [0.0, 0.25]


def events(*names: str) -> list[dict[str, Any]]:
    return [
        {"breaker": "r0", "at_s": float(at_s), "event": name} for at_s, name in enumerate(names)
    ]


@pytest.mark.parametrize(
    ("names", "num_half_open", "num_wrong"),
    [
        (("open", "half_open", "probe", "closed"), 1, 0),
        (("open", "half_open", "probe", "open", "half_open", "probe", "closed"), 2, 0),
        (("open", "half_open", "open"), 0, 0),  # tripped again before anybody called
        (("open", "half_open", "probe", "probe", "closed"), 2, 1),
        (("open", "half_open", "closed"), 0, 1),
        (("open", "probe", "half_open", "probe", "closed"), 1, 1),
    ],
)
def test_exactly_one_probe_per_half_open(names, num_half_open, num_wrong):
    found, wrong = probe_faults(events(*names))
    assert (found, len(wrong)) == (num_half_open, num_wrong)


def test_the_pause_at_a_seam_is_told_without_the_usual_one():
    times_s = [0.0, 0.1, 0.2, 2.2, 2.3, 2.4]
    assert seam_gaps_s([reply(1, times_s=times_s)], [0.25], 2.0) == [pytest.approx(1.9)]
    assert seam_gaps_s([reply(1, times_s=times_s)], [5.0], 2.0) == []


def test_faults_are_as_many_as_asked_for_and_follow_from_the_seed():
    faults = schedule(10, 4, random.Random(1))
    assert sum(fault.is_kill for fault in faults) == 10
    assert [faults.count(fault) for fault in Fault] == [5, 5, 3, 1]
    assert faults == schedule(10, 4, random.Random(1)) != schedule(10, 4, random.Random(2))


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
