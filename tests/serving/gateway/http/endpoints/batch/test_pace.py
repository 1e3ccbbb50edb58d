"""How many lines are open: as many as engines take, and few beside others' requests."""

import random

import msgspec

from router import RouterSettings
from router.core.router import Router
from router.types import EngineInfo, EngineSnapshot
from serving.gateway.http.endpoints.batch.pace import Pace

INFO = EngineInfo(
    model="m",
    tasks=("generate",),
    max_model_len=8192,
    max_num_seqs=256,
    max_num_batched_tokens=2048,
    num_kv_tokens=100_000,
    block_size=16,
)


def replicas(count: int = 4, num_decoding: int = 10):
    router = Router(RouterSettings(), random.Random(0))
    for number in range(count):
        router.on_replica_up(f"r{number}", INFO, 0.0)
        snapshot = EngineSnapshot(seq=1, num_decoding_reqs=num_decoding)
        router.on_snapshot(f"r{number}", snapshot, 0.0)
    return list(router.state(0.0).replicas.values())


def looked(pace: Pace, engines, *, times: int = 30, **seen) -> Pace:
    """Have all that is allowed open, and look again and again."""
    for number in range(times):
        known = {"num_held": 0, "has_others": False, "num_lines": pace.limit, "num_feeders": 1}
        pace.look(engines, now_s=0.25 * number, **(known | seen))
    return pace


def test_idle_engines_are_filled():
    assert looked(Pace(None, 0.05), replicas()).limit == 4 * 256 + 4


def test_the_configured_number_is_the_most():
    assert looked(Pace(7, 0.05), replicas()).limit == 7


def test_what_is_held_is_enough():
    pace = looked(Pace(None, 0.05), replicas(), times=8)
    limit = pace.limit
    assert 20 < limit < 1028
    looked(pace, replicas(), times=1, num_held=6)
    assert pace.limit == limit  # more wait than there are engines, and not twice as many
    looked(pace, replicas(), times=4, num_held=9)
    assert pace.limit < 0.5 * limit


def test_lines_that_are_not_there_do_not_raise_the_limit():
    assert looked(Pace(None, 0.05), replicas(), num_lines=3).limit < 12


def test_beside_others_lines_take_their_share():
    engines = replicas()
    few = looked(Pace(None, 0.05), engines, has_others=True)
    more = looked(Pace(None, 0.2), engines, has_others=True)
    assert few.is_busy
    assert 4 <= few.limit < more.limit < 1028
    model = engines[0].step_model
    step_s = model.step_base_s + 10 * model.decode_s
    share = model.decode_s / step_s + 500.0 * model.token_s / 5.0
    assert few.limit == int(4 * 0.05 / share)


def test_where_others_make_steps_long_lines_get_less():
    """What those lose who are there makes them stay, and steps longer again."""
    engines = replicas(num_decoding=200)
    model = engines[0].step_model
    step_s = model.step_base_s + 200 * model.decode_s
    assert step_s > 1.2 * model.step_base_s
    share = model.decode_s / step_s + 500.0 * model.token_s / 5.0
    pace = looked(Pace(None, 0.2), engines, has_others=True)
    assert pace.limit == int(4 * 0.2 / (share * step_s / model.step_base_s))


def test_gateways_that_feed_the_same_engines_share():
    alone = looked(Pace(None, 0.5), replicas(), has_others=True).limit
    shared = looked(Pace(None, 0.5), replicas(), has_others=True, num_feeders=2).limit
    assert abs(alone - 2 * shared) <= 1


def test_others_are_remembered_for_a_while():
    pace, engines = Pace(None, 0.05), replicas()
    pace.look(engines, num_held=0, has_others=True, num_lines=0, num_feeders=1, now_s=0.0)
    for now_s, is_busy in ((9.9, True), (10.1, False)):
        pace.look(engines, num_held=0, has_others=False, num_lines=0, num_feeders=1, now_s=now_s)
        assert pace.is_busy is is_busy


def test_one_line_is_always_open():
    assert looked(Pace(None, 1e-6), replicas(), has_others=True, num_held=1000).limit == 1
    assert looked(Pace(None, 0.05), [], num_held=1000).limit == 1


def test_a_draining_engine_has_no_seat():
    engines = [msgspec.structs.replace(each, is_draining=True) for each in replicas(1)]
    assert looked(Pace(None, 0.05), engines).limit == 1


def test_long_prompts_leave_fewer_seats():
    engines = replicas()
    short, long = Pace(None, 0.05), Pace(None, 0.05)
    for _ in range(500):
        short.record_line(50, 5.0)
        long.record_line(5000, 5.0)
    assert (
        looked(long, engines, has_others=True).limit < looked(short, engines, has_others=True).limit
    )
