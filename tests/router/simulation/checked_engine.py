"""An engine model that is checked after every step."""

import random
from typing import Any

from router.simulation.engine.model import EngineModel
from router.simulation.engine.profile import Profile
from router.simulation.engine.sequence import Progress


def make_profile(**changes: Any) -> Profile:
    defaults: dict[str, Any] = {
        "name": "test",
        "model": "none",
        "device": "none",
        "source": "made up",
        "max_model_len": 1000,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 100,
        "max_prefill_chunk": 0,
        "num_kv_tokens": 1600,
        "block_size": 16,
        "base_s": 0.01,
        "s_per_token": 0.001,
        "s_per_decode_req": 0.002,
        "s_per_context_token": 0.00001,
    }
    return Profile(**(defaults | changes))


def make_engine(priority: bool = True, **changes: Any) -> EngineModel:
    return EngineModel(make_profile(**changes), random.Random(0), priority=priority)


def job_ids(engine: EngineModel) -> list[str]:
    """Return the jobs that have not ended."""
    return list(engine._jobs)


class Run:
    """Steps an engine and checks what holds after every step."""

    def __init__(self, engine: EngineModel) -> None:
        self.engine = engine
        self.now_s = 0.0
        self.steps: list[tuple[int, int]] = []  # prefill tokens, decoding sequences
        self.progress: list[Progress] = []

    def step(self, until_s: float = float("-inf")) -> list[Progress]:
        duration_s = self.engine.begin_step(self.now_s, until_s)
        assert duration_s is not None
        self.now_s += duration_s
        progress = self.engine.end_step(self.now_s)
        snapshot = self.engine.snapshot(1, 0)
        self.steps.append((snapshot.step_num_prefill_tokens, snapshot.step_num_decode_reqs))
        self.progress += progress
        check(self.engine)
        return progress

    def to_end(self) -> "Run":
        while job_ids(self.engine):
            self.step()
        return self

    def finished(self) -> list[str]:
        return [each.job_id for each in self.progress if each.finished]


def check(engine: EngineModel) -> None:
    """KV blocks add up, and so do the counts of decoding sequences."""
    kv = engine.scheduler.kv
    shared, num_private, num_context, num_decoding = set(), 0, 0, 0
    for sequences in engine._jobs.values():
        for sequence in sequences:
            block_table = sequence.block_table
            if sequence.state.name == "DECODE":
                engine.scheduler.decoding.sync(sequence)
                num_decoding += 1
                num_context += (
                    sequence.job.num_prompt_tokens + engine.scheduler.decoding.num_emitted(sequence)
                )
            shared.update(block_table.shared)
            num_private += block_table.num_private
    assert kv.num_used == len(shared) * kv.segment_blocks + num_private
    assert kv.num_used + kv.num_cached + kv.num_blank == kv.num_blocks
    assert min(kv.num_used, kv.num_cached, kv.num_blank) >= 0
    snapshot = engine.snapshot(1, 0)
    assert (snapshot.num_decoding_reqs, snapshot.num_decode_context_tokens) == (
        num_decoding,
        num_context,
    )
    assert sum(engine.scheduler.decoding._num_crossing) == num_decoding
    prefill, decode = snapshot.step_num_prefill_tokens, snapshot.step_num_decode_reqs
    assert prefill + decode <= engine.profile.max_num_batched_tokens
    assert snapshot.num_running_reqs <= engine.profile.max_num_seqs
