"""What `headway` counts of the delay of others, and what it leaves out."""

import math
import random

import pytest

from router.scheduling.policies import Load, make_policy
from router.scheduling.policies.headway import costs_s
from tests.support.builders import busy, make_replica, req

NOTHING_HELD = Load(num_held_per_engine=0.0)


def test_headway_spares_those_who_decode():
    quiet, crowded = make_replica("r0"), make_replica("r1")
    quiet.receive(busy(num_running_reqs=1, num_decoding_reqs=1), 0.0)
    crowded.receive(busy(num_running_reqs=7, num_decoding_reqs=7), 0.0)
    # What both have in common is left out. Of 128 tokens, those until engines of four sequences in
    # the mean are alike again, for each of the six more.
    delay_s = 6 * 128 / math.sqrt(4) * quiet.predictor.decode_s
    costs = costs_s(req("a", 50), [quiet, crowded], [50, 50], NOTHING_HELD, 0.0)
    assert costs[0] == pytest.approx(quiet.ttft_s(50, 0.0))
    assert costs[1] == pytest.approx(crowded.ttft_s(50, 0.0) + delay_s)
    assert (
        make_policy("headway", random.Random(0), ()).choose(
            req("a", 50), [crowded, quiet], NOTHING_HELD, 0.0
        )
        is quiet
    )


def test_headway_tells_first_tokens_apart_where_answers_are_long():
    """By the costs in full they would be equal: five per cent of half a minute is a second."""
    idle, at_work = make_replica("r0"), make_replica("r1")
    for replica in (idle, at_work):
        replica.receive(busy(num_running_reqs=40, num_decoding_reqs=40), 0.0)
    at_work.book(req("b", 200), num_kv_tokens=200, now_s=0.0)
    request = req("a", 50, num_expected_output_tokens=20_000)
    policy = make_policy("headway", random.Random(0), ())
    chosen = {policy.choose(request, [at_work, idle], NOTHING_HELD, 0.0).id for _ in range(30)}
    assert chosen == {idle.id}


def test_what_decodes_waits_for_what_another_engine_holds_and_for_nothing_else():
    """What is prefilled in any case delays as many wherever it is done."""
    holder, other = make_replica("r0"), make_replica("r1")
    for replica in (holder, other):
        replica.receive(busy(num_running_reqs=5, num_decoding_reqs=5), 0.0)
    request = req("a", 1000)
    costs = costs_s(request, [holder, other], [100, 1000], NOTHING_HELD, 0.0)
    again_s = 900 * other.token_s
    assert costs[0] == pytest.approx(holder.ttft_s(100, 0.0))
    assert costs[1] == pytest.approx(other.ttft_s(1000, 0.0) + 5 * again_s)
