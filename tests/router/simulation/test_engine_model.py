"""The engine model against vLLM's rules, step by step."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.simulation.engine.model import EngineModel
from router.simulation.engine.sequence import Job, Progress
from router.simulation.engine.unloaded import UnloadedTimes
from serving.capacity.profiles import load_profile
from tests.router.simulation.checked_engine import Run, check, job_ids, make_engine, make_profile


def test_a_prompt_in_chunks_then_one_token_per_step() -> None:
    engine = make_engine()
    engine.add(Job("a", 250, 3))
    run = Run(engine)
    assert [run.step() for _ in range(2)] == [[], []]
    assert engine.snapshot(1, 0).num_pending_prefill_tokens == 50
    assert run.step() == [Progress("a", 0, 1, False, 0)]
    assert run.step() == []
    assert engine.num_output_tokens("a") == 2
    assert run.step() == [Progress("a", 0, 3, True, 0)]
    assert run.steps == [(100, 0), (100, 0), (50, 0), (0, 1), (0, 1)]
    assert engine.begin_step(run.now_s) is None
    # 3 steps of prefill and 2 of decode at contexts 251 and 252.
    assert run.now_s == pytest.approx(5 * 0.01 + 252 * 0.001 + 2 * 0.002 + 503 * 0.00001)
    assert engine.scheduler.kv.num_used == 0
    assert engine.snapshot(1, 0).num_output_tokens_total == 3


def test_running_first_then_waiting_within_one_budget() -> None:
    engine = make_engine()
    run = Run(engine)
    engine.add(Job("a", 40, 9))
    run.step()
    engine.add(Job("b", 150, 9))
    engine.add(Job("c", 30, 9))
    run.step()  # a decodes, b takes the rest
    run.step()  # b ends its prefill, c fits behind it
    assert run.steps == [(40, 0), (99, 1), (51 + 30, 1)]


def test_a_long_prompt_leaves_room_for_others_unless_alone() -> None:
    engine = make_engine(max_prefill_chunk=50)
    run = Run(engine)
    engine.add(Job("a", 300, 2))
    run.step()
    engine.add(Job("b", 20, 2))
    run.step()
    assert run.steps == [(100, 0), (50 + 20, 0)]


def test_decodes_starve_behind_chunks_that_take_the_whole_budget() -> None:
    """As in vLLM: running sequences in the order of admission, whatever they do."""
    engine = make_engine(max_prefill_chunk=50)
    run = Run(engine)
    engine.add(Job("a", 200, 5))
    engine.add(Job("b", 10, 5))
    engine.add(Job("c", 200, 5))
    run.step()  # a 50, b 10, c 40
    run.step()  # a 50, b 1, c 49
    engine.add(Job("d", 200, 5))
    run.step()
    assert run.steps == [(100, 0), (99, 1), (99, 1)]
    engine = make_engine(max_prefill_chunk=50)
    run = Run(engine)
    engine.add(Job("a", 200, 5))
    engine.add(Job("b", 200, 5))
    run.step()
    assert run.steps == [(100, 0)]
    assert sorted(run.to_end().finished()) == ["a", "b"]


def test_stalled_decodes_lose_a_step_and_no_token() -> None:
    engine = make_engine(max_num_batched_tokens=20, max_prefill_chunk=10, max_num_seqs=4)
    run = Run(engine)
    engine.add(Job("long", 60, 4))
    engine.add(Job("short", 5, 6))
    engine.add(Job("second", 60, 4))
    run.step()  # long 10, short 5, second 5
    run.step()  # long 10, short 1, second 9
    engine.add(Job("third", 60, 4))
    run.to_end()
    assert all(prefill + decode <= 20 for prefill, decode in run.steps)
    assert {each.job_id: each.num_tokens for each in run.progress if each.finished} == {
        "long": 4,
        "short": 6,
        "second": 4,
        "third": 4,
    }


def test_no_more_sequences_than_allowed() -> None:
    engine = make_engine(max_num_seqs=2)
    for name in "abc":
        engine.add(Job(name, 10, 3))
    run = Run(engine)
    run.step()
    assert engine.snapshot(1, 0).num_waiting_reqs == 1
    run.to_end()
    assert run.finished() == ["a", "b", "c"]


def test_priority_orders_the_queue_and_arrival_breaks_ties() -> None:
    for priority, order in ((True, ["c", "a", "b"]), (False, ["a", "b", "c"])):
        engine = make_engine(priority, max_num_seqs=1)
        engine.add(Job("a", 10, 2, priority=5))
        engine.add(Job("b", 10, 2, priority=5))
        engine.add(Job("c", 10, 2, priority=1))
        assert Run(engine).to_end().finished() == order


def test_a_whole_prompt_must_fit_before_it_starts() -> None:
    engine = make_engine(max_model_len=320, num_kv_tokens=320)
    engine.add(Job("a", 160, 20))
    engine.add(Job("b", 170, 2))  # 11 blocks; 10 and later 8 are free
    run = Run(engine)
    run.step()
    run.step()
    assert engine.snapshot(1, 0).num_waiting_reqs == 1
    assert run.to_end().finished() == ["a", "b"]


@pytest.mark.parametrize(("priority", "victim"), [(True, "a"), (False, "b")])
def test_preemption_computes_anew_what_it_lost(priority: bool, victim: str) -> None:
    engine = make_engine(priority, max_model_len=160, num_kv_tokens=160, block_size=16)
    engine.add(Job("a", 64, 40, priority=2))
    engine.add(Job("b", 64, 40, priority=1))
    run = Run(engine)
    for _ in range(60):
        run.step()
        snapshot = engine.snapshot(1, 0)
        if snapshot.num_preemptions_total:
            break
    # The whole cache is 10 blocks: both fill their fifth, then one gives way.
    assert (snapshot.num_preemptions_total, snapshot.num_waiting_reqs) == (1, 1)
    assert engine.scheduler.waiting._sequences[f"{victim}/0"].num_emitted == 16
    assert snapshot.num_pending_prefill_tokens == 64 + 16
    run.to_end()
    assert {each.num_tokens for each in run.progress if each.finished} == {40}
    # It found the blocks again that the other had not taken meanwhile.
    total = engine.snapshot(1, 0).num_prefill_tokens_total
    assert 128 < total < 128 + 64 + 16
    assert len([each for each in run.progress if not each.finished]) == 2  # first tokens once


def test_prefix_hits_are_whole_blocks_and_leave_one_token() -> None:
    engine = make_engine()
    run = Run(engine)
    engine.add(Job("a", 64, 1, block_hashes=(1, 2, 3, 4)))
    run.to_end()
    engine.add(Job("b", 64, 1, block_hashes=(1, 2, 3, 4)))
    assert run.step() == [Progress("b", 0, 1, True, 48)]
    engine.add(Job("c", 65, 1, block_hashes=(1, 2, 3, 4)))
    assert run.step() == [Progress("c", 0, 1, True, 64)]
    assert [prefill for prefill, _ in run.steps] == [64, 16, 1]
    snapshot = engine.snapshot(1, 0)
    assert snapshot.num_prefix_queries_total == 64 + 64 + 65
    assert snapshot.num_prefix_hits_total == 48 + 64


def test_the_next_turn_finds_the_answer_too() -> None:
    engine = make_engine()
    run = Run(engine)
    engine.add(Job("first", 20, 30, block_hashes=(1, 2, 3)))
    run.to_end()
    engine.add(Job("second", 60, 1, block_hashes=(1, 2, 3)))
    assert run.step() == [Progress("second", 0, 1, True, 48)]


def test_shared_within_one_step() -> None:
    """vLLM caches a block when it is scheduled, not when it is computed."""
    engine = make_engine()
    engine.add(Job("a", 48, 1, block_hashes=(1, 2)))
    engine.add(Job("b", 48, 1, block_hashes=(1, 2)))
    run = Run(engine)
    run.step()
    assert run.steps == [(48 + 16, 0)]


def test_sequences_of_one_job_share_its_prompt() -> None:
    engine = make_engine()
    engine.add(Job("a", 40, 5, num_sequences=3))
    run = Run(engine)
    run.step()
    assert run.steps == [(40 + 8 + 8, 0)]
    run.to_end()
    assert sorted(each.index for each in run.progress if each.finished) == [0, 1, 2]


def test_abort_frees_everything_at_the_end_of_the_step() -> None:
    engine = make_engine(max_num_seqs=2)
    run = Run(engine)
    for name in "abc":
        engine.add(Job(name, 30, 50))
    run.step()
    duration_s = engine.begin_step(run.now_s)
    for name in "ac":
        engine.abort(name)
    engine.abort("unknown")
    assert job_ids(engine) == ["a", "b", "c"]
    engine.end_step(run.now_s + duration_s)
    assert job_ids(engine) == ["b"]
    check(engine)
    engine.abort("b")
    assert engine.scheduler.kv.num_used == 0
    assert engine.begin_step(9.0) is None
    snapshot = engine.snapshot(1, 0)
    assert (snapshot.num_inflight_reqs, snapshot.num_pending_prefill_tokens) == (0, 0)


def test_impossible_jobs_are_refused_and_long_outputs_cut() -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match="max_model_len is 1000"):
        engine.add(Job("a", 1000, 1))
    engine.add(Job("a", 990, 100))
    with pytest.raises(ValueError, match="here already"):
        engine.add(Job("a", 10, 1))
    (last,) = [each for each in Run(engine).to_end().progress if each.finished]
    assert last.num_tokens == 10


def test_a_run_is_cut_when_somebody_comes() -> None:
    engine = make_engine()
    engine.add(Job("a", 16, 100))
    run = Run(engine)
    run.step()
    start_s = run.now_s
    duration_s = engine.begin_step(start_s, until_s=1e9)
    assert engine.cut_run(start_s) == pytest.approx(start_s + 0.01317)
    engine.advance_to(start_s + duration_s)
    engine.end_step(engine.cut_run(start_s))
    assert engine.num_output_tokens("a") == 2
    # All the rest at once: 98 steps, each 0.01 ms longer than the one before.
    assert duration_s == pytest.approx(99 * 0.013 + 0.00001 * sum(range(17, 116)))


jobs = st.lists(
    st.tuples(
        st.integers(1, 200),  # prompt
        st.integers(1, 60),  # output
        st.integers(0, 2),  # priority
        st.sampled_from(["", "x", "xy", "z"]),  # whose prefix
        st.integers(0, 12),  # steps until it comes
        st.integers(1, 2),  # sequences
        st.booleans(),  # aborted some time
    ),
    min_size=1,
    max_size=12,
)


def make_job(number: int, job: tuple) -> Job:
    num_prompt, num_output, priority, prefix, _, num_sequences, _ = job
    num_hashes = num_prompt // 16 if prefix else 0
    hashes = tuple(hash((prefix[: index // 2 + 1], index)) for index in range(num_hashes))
    return Job(str(number), num_prompt, num_output, priority, hashes, num_sequences)


@settings(max_examples=200, deadline=None)
@given(jobs, st.booleans(), st.sampled_from([0, 30]), st.integers(16, 40))
def test_everything_ends_and_nothing_leaks(
    plan: list, priority: bool, chunk: int, num_blocks: int
) -> None:
    """Arrivals, aborts and preemptions in a small cache: `check` holds after each step."""
    engine = make_engine(
        priority,
        max_model_len=256,
        num_kv_tokens=16 * num_blocks,
        max_num_seqs=6,
        max_num_batched_tokens=64,
        max_prefill_chunk=chunk,
        noise=0.2,
    )
    run = Run(engine)
    waiting = [make_job(number, job) for number, job in enumerate(plan)]
    aborted = {each.id for each, job in zip(waiting, plan, strict=True) if job[6]}
    for (*_, num_steps, _, _), job in zip(plan, list(waiting), strict=True):
        for _ in range(num_steps):
            if job_ids(engine):
                run.step()
        for gone in aborted & set(job_ids(engine)):
            engine.abort(gone)
            check(engine)
        engine.add(job)
    for _ in range(5000):
        if not job_ids(engine):
            break
        run.step()
    assert not job_ids(engine)
    assert engine.scheduler.kv.num_used == 0
    finished = [(each.job_id, each.index) for each in run.progress if each.finished]
    assert len(set(finished)) == len(finished)
    assert {(job.id, index) for job in waiting for index in range(job.num_sequences)} - set(
        finished
    ) <= {(id_, index) for id_ in aborted for index in range(2)}


@settings(max_examples=100, deadline=None)
@given(jobs, st.floats(0.01, 3.0), st.integers(16, 40))
def test_runs_are_the_very_same_steps(plan: list, until_s: float, num_blocks: int) -> None:
    """One step at a time or as many as possible at once, cut at arrivals: no difference."""

    def trace(coalesce: bool) -> list:
        engine = make_engine(max_model_len=256, num_kv_tokens=16 * num_blocks, noise=0.1)
        events, now_s, end_s, seen = [], 0.0, None, []
        for number, job in enumerate(plan):
            now_s += job[4] * 0.03
            events.append((now_s, make_job(number, job)))
        while events or end_s is not None:
            if events and (end_s is None or events[0][0] < end_s):
                now_s, job = events.pop(0)
                engine.advance_to(now_s)
                engine.add(job)
                if end_s is not None:
                    end_s = engine.cut_run(now_s)
                seen.append((now_s, engine.snapshot(1, 0)))
            else:
                now_s = end_s
                seen += [(now_s, each) for each in engine.end_step(now_s)]
                end_s = None
            if end_s is None:
                engine.begin_step(now_s, now_s + until_s if coalesce else -1.0)
                end_s = engine.end_s
        return seen

    assert trace(True) == trace(False)


@pytest.mark.parametrize("profile", [make_profile(), load_profile("h100")])
def test_unloaded_times_are_those_of_an_idle_engine(profile) -> None:
    """In closed form what the model takes step by step."""
    profile = profile.model_copy(update={"noise": 0.0})
    sizes = [(1, 1), (99, 2), (100, 30), (101, 1), (700, 200)]
    times = UnloadedTimes.of(*(np.array(each) for each in zip(*sizes, strict=True)), profile)
    for number, (num_prompt, num_output) in enumerate(sizes):
        engine = EngineModel(profile, random.Random(0))
        engine.add(Job("alone", num_prompt, num_output))
        now_s, first_s = 0.0, None
        while (step_s := engine.begin_step(now_s)) is not None:
            now_s += step_s
            if engine.end_step(now_s) and first_s is None:
                first_s = now_s
        assert times.first_s[number] == pytest.approx(first_s, rel=1e-9)
        assert times.whole_s[number] == pytest.approx(now_s, rel=1e-9)
        assert times.each_s[number] * (num_output - 1) == pytest.approx(
            now_s - first_s, rel=1e-9, abs=1e-12
        )
