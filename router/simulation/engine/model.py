"""When does each step of an engine end, and what has it computed?

vLLM's continuous batching in virtual time, without the model. `StepScheduler` chooses what a step
computes, the profile says how long that takes. Decoding sequences advance by one token per step
and are only counted: a step costs what changes in it, and successive steps in which only counts
change are one run (`begin_step(until_s=...)`).
"""

import itertools
import math
import random
from collections.abc import Hashable
from collections.abc import Sequence as Row

from router import EngineInfo, EngineSnapshot
from router.fleet.block_log import BlockLog
from router.fleet.step_budget import StepBudget
from router.simulation.engine.profile import Profile
from router.simulation.engine.sequence import DECODE, DONE, Job, Progress, Sequence
from router.simulation.engine.step_noise import StepNoise
from router.simulation.engine.step_scheduler import StepScheduler
from router.types import PREFILL_RATE_FORGETTING


class EngineModel:
    """One engine; `now_s` is the caller's virtual clock.

    The caller alternates `begin_step` and `end_step`, the latter at the time that the former
    returned. Jobs are added and aborted at any time and count from the next step on.

    `segment_tokens`: tokens that one hash of a job covers; a multiple of the profile's block size,
    which is the default. `itl_target_s`: steps prefill as Headway's engines do, by `StepBudget`;
    None: as vLLM alone.
    """

    def __init__(
        self,
        profile: Profile,
        rng: random.Random,
        *,
        priority: bool = True,
        itl_target_s: float | None = None,
        segment_tokens: int | None = None,
    ) -> None:
        segment_tokens = segment_tokens or profile.block_size
        if segment_tokens % profile.block_size:
            raise ValueError(f"segment_tokens: {segment_tokens} is not a multiple of block_size")
        self.profile = profile
        self.info = EngineInfo(
            model=profile.model,
            tasks=("generate",),
            max_model_len=profile.max_model_len,
            max_num_seqs=profile.max_num_seqs,
            max_num_batched_tokens=profile.max_num_batched_tokens,
            max_prefill_chunk=profile.max_prefill_chunk,
            itl_target_s=itl_target_s or 0.0,
            num_kv_tokens=profile.num_kv_blocks * profile.block_size,
            block_size=segment_tokens,
            device=profile.device,
            engine=f"simulated vLLM 0.32 scheduler, profile {profile.name}",
        )
        self._budget: StepBudget | None = None
        if itl_target_s is not None:
            self._budget = StepBudget(itl_target_s, profile.max_num_batched_tokens)
        self.scheduler = StepScheduler(
            profile,
            segment_tokens // profile.block_size,
            priority=priority,
            budget=self._budget,
        )
        self.num_prefill_tokens_total = 0
        self.num_output_tokens_total = 0
        self.num_steps_total = 0
        self.step_s = 0.0
        self.step_num_prefill_tokens = 0
        self.step_num_prefill_pairs = 0.0
        self.step_num_decode_reqs = 0
        self.slowness = 1.0  # of the next steps: their time over that of an engine alone
        self._cost = profile.step_cost
        self._noise = StepNoise(rng, profile.noise)
        self._block_size = profile.block_size
        self._serials = itertools.count()
        self._jobs: dict[str, list[Sequence]] = {}
        # The run in progress: one step or several.
        self._ends_s: list[float] = []  # of its steps
        self._num_applied_steps = 0  # of these, whose effects are counted
        self._began_s = 0.0
        self._num_prefill_tokens = 0
        self._num_prefill_pairs = 0.0
        self._aborted: list[str] = []
        self._prefill_rate_tokens = 0.0
        self._prefill_rate_s = 0.0

    @property
    def blocks(self) -> BlockLog:
        """The blocks in the prefix cache, by the hashes of jobs."""
        return self.scheduler.kv.log

    @property
    def num_preemptions_total(self) -> int:
        return self.scheduler.num_preemptions_total

    # Jobs

    def add(self, job: Job) -> None:
        """Queue a job. Raises `ValueError` for one that this engine can never serve.

        Its output is cut where the model's context ends, as in vLLM.
        """
        room = self.profile.max_model_len - job.num_prompt_tokens
        if job.num_prompt_tokens < 1 or job.num_output_tokens < 1 or room < 1:
            raise ValueError(
                f"job {job.id}: {job.num_prompt_tokens} prompt and {job.num_output_tokens} output "
                f"tokens, where max_model_len is {self.profile.max_model_len}"
            )
        if job.id in self._jobs:
            raise ValueError(f"job {job.id}: is here already")
        keys: Row[Hashable] = job.block_hashes
        if job.num_sequences > 1 and not keys:
            # The sequences of one job share its prompt, though no other job can.
            size = self.scheduler.kv.segment_blocks * self.profile.block_size
            keys = [(job.id, index) for index in range(job.num_prompt_tokens // size)]
        sequences = []
        for index in range(job.num_sequences):
            sequence = Sequence(job, index, next(self._serials), keys)
            sequence.num_output = min(job.num_output_tokens, room)
            sequences.append(sequence)
            self.scheduler.add(sequence)
        self._jobs[job.id] = sequences

    def abort(self, job_id: str) -> None:
        """Drop a job at the end of the step in progress, or now. Unknown ids do nothing."""
        if self._ends_s:
            self._aborted.append(job_id)
        else:
            self._drop(job_id)

    def num_output_tokens(self, job_id: str, index: int = 0) -> int:
        """Return the tokens that a job's sequence has emitted. The job must be in the engine."""
        sequence = self._jobs[job_id][index]
        if sequence.state is DECODE:
            return self.scheduler.decoding.num_emitted(sequence)
        return sequence.num_emitted

    # Steps

    @property
    def step_ends_s(self) -> list[float]:
        """The ends of the steps of the run in progress; empty between runs."""
        return self._ends_s

    @property
    def end_s(self) -> float | None:
        """The end of the step or run in progress; None when there is none."""
        return self._ends_s[-1] if self._ends_s else None

    def begin_step(self, now_s: float, until_s: float = -math.inf) -> float | None:
        """Start a step; return how long it takes, seconds, or None when there is nothing to do.

        With `until_s`, start a run of steps for as long as only counts change from one to the
        next. It ends with the first step that ends at or after `until_s`. Its steps are those that
        single calls would have made.
        """
        assert not self._ends_s, "the step in progress has not ended"
        if self.scheduler.is_idle:
            return None
        self._began_s = now_s
        self._num_applied_steps = 0
        self._num_prefill_tokens = 0
        self._num_prefill_pairs = 0.0
        if self.scheduler.only_decodes:
            return self._begin_run(now_s, until_s)
        self.scheduler.schedule()
        num_prefill_tokens = 0
        num_pairs = 0.0
        for sequence, num_tokens in self.scheduler.prefills.items():
            num_prefill_tokens += num_tokens
            num_pairs += num_tokens * (sequence.num_computed + num_tokens / 2)
        self._num_prefill_tokens = num_prefill_tokens
        self._num_prefill_pairs = num_pairs
        decoding = self.scheduler.decoding
        duration_s = (
            self.slowness
            * self._noise.factor(0)
            * self._cost.step_s(
                num_prefill_tokens,
                decoding.num_sequences,
                decoding.num_context_tokens,
                num_pairs,
            )
        )
        self._ends_s.append(now_s + duration_s)
        return duration_s

    def cut_run(self, now_s: float) -> float | None:
        """End the run with the step in progress at `now_s`; return that end, or None when idle.

        Called when a job was added or aborted during a run.
        """
        ends_s = self._ends_s
        for index, end_s in enumerate(ends_s):
            if end_s >= now_s:
                del ends_s[index + 1 :]
                break
        return self.end_s

    def advance_to(self, now_s: float) -> None:
        """Apply the steps of the run that have ended by `now_s`; `end_step` applies the last."""
        ends_s = self._ends_s
        first = self._num_applied_steps
        end, last = first, len(ends_s) - 1
        while end < last and ends_s[end] <= now_s:
            end += 1
        if end > first:
            # The first step's blocks were allocated when the run began.
            num_steps = end - first
            decoding = self.scheduler.decoding
            num_blocks = 0
            for step in range(1, num_steps + 1):
                num_blocks += decoding.num_new_blocks(step)
            self._apply_steps(num_steps)
            self.scheduler.kv.allocate_blocks(num_blocks)

    def end_step(self, now_s: float) -> list[Progress]:
        """End the step or run; return the sequences that began or ended their output with it.

        Every other decoding sequence has emitted one token per step.
        """
        self.advance_to(math.inf)
        self._apply_steps(1)
        self._ends_s.clear()
        computed, finished = self.scheduler.complete()
        self.num_output_tokens_total += len(computed)
        progress = []
        for sequence in computed:
            if sequence.num_emitted == 1 and sequence.state is not DONE:
                progress.append(self._progress(sequence, finished=False))
        for sequence in finished:
            progress.append(self._progress(sequence, finished=True))
        for sequence in finished:
            self._forget_if_done(sequence.job.id)
        if self._aborted:
            gone = set(self._aborted)
            self._aborted.clear()
            progress = [each for each in progress if each.job_id not in gone]
            for job_id in gone:
                self._drop(job_id)
        return progress

    def snapshot(self, seq: int, last_booking: int) -> EngineSnapshot:
        """Return the state after the last step that was applied."""
        scheduler = self.scheduler
        num_pending, num_demand = scheduler.pending_tokens()
        num_free = scheduler.kv.num_free
        return EngineSnapshot(
            seq=seq,
            last_booking=last_booking,
            num_running_reqs=len(scheduler.running),
            num_waiting_reqs=len(scheduler.waiting),
            num_inflight_reqs=len(self._jobs),
            kv_cache_usage=1.0 - num_free / scheduler.kv.num_blocks,
            num_free_kv_tokens=num_free * self._block_size,
            num_pending_prefill_tokens=num_pending,
            num_step_demand_tokens=num_demand,
            num_decoding_reqs=scheduler.num_decoding,
            num_decode_context_tokens=scheduler.num_decode_context_tokens,
            prefill_tokens_per_s=(
                self._prefill_rate_tokens / self._prefill_rate_s if self._prefill_rate_s else 0.0
            ),
            step_s=self.step_s,
            step_num_prefill_tokens=self.step_num_prefill_tokens,
            step_num_prefill_pairs=self.step_num_prefill_pairs,
            step_num_decode_reqs=self.step_num_decode_reqs,
            num_prefill_tokens_total=self.num_prefill_tokens_total,
            num_prefix_queries_total=scheduler.num_prefix_queries_total,
            num_prefix_hits_total=scheduler.num_prefix_hits_total,
            num_preemptions_total=scheduler.num_preemptions_total,
            num_output_tokens_total=self.num_output_tokens_total,
            num_steps_total=self.num_steps_total,
        )

    # Runs of steps in which all sequences decode and nothing else happens

    def _begin_run(self, now_s: float, until_s: float) -> float:
        decoding, kv, noise = self.scheduler.decoding, self.scheduler.kv, self._noise
        num_decoding, num_context = decoding.num_sequences, decoding.num_context_tokens
        fixed_s = self._cost.step_s(0, num_decoding, 0, 0.0)
        s_per_context_token = self._cost.s_per_context_token
        slowness = self.slowness
        num_steps_left = decoding.next_finish_tick() - decoding.tick
        kv.allocate_blocks(decoding.num_new_blocks())
        num_free = kv.num_free
        ends_s, end_s, num_steps = self._ends_s, now_s, 0
        while True:
            step_s = slowness * (fixed_s + s_per_context_token * num_context)
            end_s += noise.factor(num_steps) * step_s
            ends_s.append(end_s)
            num_steps += 1
            num_context += num_decoding
            num_free -= decoding.num_new_blocks(num_steps)
            if end_s >= until_s or num_steps == num_steps_left or num_free < 0:
                return end_s - now_s

    def _apply_steps(self, num_steps: int) -> None:
        """Apply the next step of the run, or several in which all sequences only decoded."""
        last = self._num_applied_steps + num_steps - 1
        self.step_s = self._ends_s[last] - (self._ends_s[last - 1] if last else self._began_s)
        self._num_applied_steps += num_steps
        self._noise.advance(num_steps)
        num_prefill_tokens = self._num_prefill_tokens
        self.step_num_prefill_tokens = num_prefill_tokens
        self.step_num_prefill_pairs = self._num_prefill_pairs
        decoding = self.scheduler.decoding
        self.step_num_decode_reqs = decoding.num_sequences
        if num_prefill_tokens:
            self.num_prefill_tokens_total += num_prefill_tokens
            keep = 1.0 - PREFILL_RATE_FORGETTING
            self._prefill_rate_tokens = keep * self._prefill_rate_tokens + num_prefill_tokens
            self._prefill_rate_s = keep * self._prefill_rate_s + self.step_s
            if self._budget is not None:
                self._budget.learn(self.step_s, num_prefill_tokens, self.step_num_decode_reqs)
        self.num_steps_total += num_steps
        decoding.advance(num_steps)
        self.num_output_tokens_total += num_steps * decoding.num_sequences

    def _progress(self, sequence: Sequence, finished: bool) -> Progress:
        return Progress(
            sequence.job.id,
            sequence.index,
            sequence.num_emitted,
            finished,
            sequence.num_cached,
            sequence.num_preemptions,
        )

    def _forget_if_done(self, job_id: str) -> None:
        sequences = self._jobs.get(job_id)
        if sequences is None:
            return  # by another sequence of it that ended in the same step
        for sequence in sequences:
            if sequence.state is not DONE:
                return
        del self._jobs[job_id]

    def _drop(self, job_id: str) -> None:
        for sequence in self._jobs.pop(job_id, ()):
            self.scheduler.drop(sequence)
