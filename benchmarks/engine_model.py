"""An engine in virtual time: vLLM's continuous batching without the model.

Follows `Scheduler.schedule` of vLLM 0.32 (v1/core/sched/scheduler.py): one
token budget per step; running sequences first, in the order of their
admission, then waiting ones; chunked prefill; a whole prompt must fit into
free KV blocks before it is admitted; a running sequence that finds no block
preempts the last one, or the least urgent, which is computed anew later. Not
modelled: asynchronous scheduling, by which a newcomer can wait one step more.

Sequences that decode all advance by one token per step, so they are counted
and not visited: a step costs what changes in it, and a run of steps in which
nothing but counts changes can be taken at once (`begin_step(until_s=...)`).
"""

import bisect
import itertools
import math
import random
from collections import deque
from collections.abc import Hashable, Iterator
from collections.abc import Sequence as Row

from benchmarks.decode_batch import DecodeBatch
from benchmarks.kv_cache import KvCache
from benchmarks.profile import Profile
from benchmarks.sequence import Job, Progress, Sequence, State
from benchmarks.waiting_sequences import WaitingSequences
from router.types import EngineInfo, EngineSnapshot
from serving.block_log import BlockLog

# As in serving/monitor.py: what one step replaces of the prefill rate's memory.
_RATE_FORGETTING = 0.05


class EngineModel:
    """One engine; `now_s` is the caller's virtual clock.

    The caller alternates `begin_step` and `end_step`, the latter at the time
    that the former named. Jobs are added and aborted at any time and count
    from the next step on.

    `segment_tokens`: what one of a job's hashes covers; a multiple of the
    profile's block size, which is the default. `paces`: steps are made up as by
    `serving/scheduler.py`, not by vLLM alone: no long prompt takes more than its part,
    and every second step is without those that are less urgent than who waits.
    """

    def __init__(
        self,
        profile: Profile,
        rng: random.Random,
        *,
        priority: bool = True,
        paces: bool = False,
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
            max_prefill_chunk=profile.prefill_chunk,
            num_kv_tokens=profile.num_kv_blocks * profile.block_size,
            block_size=segment_tokens,
            device=profile.device,
            engine=f"simulated vLLM 0.32 scheduler, profile {profile.name}",
        )
        self.kv = KvCache(profile.num_kv_blocks, segment_tokens // profile.block_size)
        self.num_prefill_tokens_total = 0
        self.num_prefix_queries_total = 0
        self.num_prefix_hits_total = 0
        self.num_preemptions_total = 0
        self.num_output_tokens_total = 0
        self.num_steps_total = 0
        self.step_s = 0.0
        self.step_num_prefill_tokens = 0
        self.step_num_decode_reqs = 0
        self.slowness = 1.0  # of the steps begun from now on: what neighbours cost
        self._rng = rng
        self._priority = priority
        self._paces = paces
        self._deferred: list[Sequence] = []  # left out of the current step
        self._block_size = profile.block_size
        self._chunk = profile.prefill_chunk or profile.max_num_batched_tokens
        self._serials = itertools.count()
        self._num_prepended = 0
        self._num_admissions = 0
        self._jobs: dict[str, list[Sequence]] = {}
        self._waiting = WaitingSequences(self._chunk)
        self._running: dict[Sequence, None] = {}
        self._prefilling: dict[Sequence, None] = {}
        # The head that found no room, and the cache's epoch at that time.
        self._blocked: tuple[Sequence, int] | None = None
        self._decoding = DecodeBatch(self.kv, self._block_size)
        # The step in progress.
        self._ends_s: list[float] = []  # of it, or of each of a run of steps
        self._num_settled = 0
        self._began_s = 0.0
        self._factors: deque[float] = deque()  # noise of the coming steps, as far as drawn
        self._prefills: dict[Sequence, int] = {}
        self._stalled: list[Sequence] = []
        self._aborted: list[str] = []
        self._prefill_rate_tokens = 0.0
        self._prefill_rate_s = 0.0

    @property
    def blocks(self) -> BlockLog:
        """What the prefix cache holds, by the hashes of jobs."""
        return self.kv.log

    # Jobs

    def add(self, job: Job) -> None:
        """Queue a job. Raises `ValueError` for one that this engine can never serve.

        Its output is cut where the model's context ends, as vLLM does.
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
            # The sequences of one job share its prompt, whoever else may.
            size = self.kv.segment_blocks * self._block_size
            keys = [(job.id, index) for index in range(job.num_prompt_tokens // size)]
        sequences = []
        for index in range(job.num_sequences):
            sequence = Sequence(job, index, next(self._serials), keys)
            sequence.num_output = min(job.num_output_tokens, room)
            sequences.append(sequence)
            self._waiting.push(
                sequence, (float(job.priority if self._priority else 0), sequence.serial)
            )
        self._jobs[job.id] = sequences

    def abort(self, job_id: str) -> None:
        """Drop a job at the end of the step in progress, or now; unknown ids are fine."""
        if self._ends_s:
            self._aborted.append(job_id)
        else:
            self._drop(job_id)

    def num_output_tokens(self, job_id: str, index: int = 0) -> int:
        """Tokens that this sequence of a job in the engine has emitted."""
        sequence = self._jobs[job_id][index]
        if sequence.state is State.DECODE:
            return self._decoding.num_emitted(sequence)
        return sequence.num_emitted

    def job_ids(self) -> Iterator[str]:
        """The jobs that have not ended."""
        return iter(self._jobs)

    # Steps

    @property
    def step_ends_s(self) -> Row[float]:
        """When the steps of the run in progress end; empty between runs."""
        return self._ends_s

    @property
    def end_s(self) -> float | None:
        """When the step or run in progress ends; None when there is none."""
        return self._ends_s[-1] if self._ends_s else None

    def begin_step(self, now_s: float, until_s: float = -math.inf) -> float | None:
        """Start a step; return how long it takes, seconds, or None when there is nothing to do.

        With `until_s`, start a run of steps as long as nothing but counts changes
        from one to the next, and end it with the first step that ends at or after
        `until_s`. Its steps are those that single calls would have made.
        """
        assert not self._ends_s, "the step in progress has not ended"
        if not self._running and not self._waiting:
            return None
        self._began_s = now_s
        self._num_settled = 0
        if not (
            self._prefilling
            or self._waiting
            or self._decoding.num_new_blocks() > self.kv.num_free
            or self._decoding.num_sequences > self.profile.max_num_batched_tokens
        ):
            return self._begin_run(now_s, until_s)
        self._schedule()
        num_prefill_tokens, num_pairs = 0, 0.0
        for sequence, num_tokens in self._prefills.items():
            num_prefill_tokens += num_tokens
            num_pairs += num_tokens * (sequence.num_computed + num_tokens / 2)
        duration_s = (
            self.slowness
            * self._noise(0)
            * self.profile.step_s(
                num_prefill_tokens,
                self._decoding.num_sequences,
                self._decoding.num_context_tokens,
                num_pairs,
            )
        )
        self._ends_s.append(now_s + duration_s)
        return duration_s

    def cut(self, now_s: float) -> float | None:
        """End the run with the step in progress at `now_s`; return that end, or None when idle.

        To be called when a job has come or gone during a run.
        """
        ends_s = self._ends_s
        for index, end_s in enumerate(ends_s):
            if end_s >= now_s:
                del ends_s[index + 1 :]
                break
        return self.end_s

    def settle(self, now_s: float) -> None:
        """Account for the steps of a run that have ended by `now_s`; the last is `end_step`'s."""
        first = self._num_settled
        end = bisect.bisect_right(self._ends_s, now_s, first, max(first, len(self._ends_s) - 1))
        if end > first:
            # The blocks of the first were taken when the run began.
            num_steps = end - first
            num_blocks = sum(map(self._decoding.num_new_blocks, range(1, num_steps + 1)))
            self._account(num_steps)
            self.kv.take(num_blocks)

    def end_step(self, now_s: float) -> list[Progress]:
        """End the step, or run, and return who began or ended its output with it.

        Every other decoding sequence has emitted one token per step.
        """
        self.settle(math.inf)
        self._account(1)
        self._ends_s.clear()
        progress: list[Progress] = []
        finished = self._decoding.leave_finished()
        for sequence, num_tokens in self._prefills.items():
            sequence.num_computed += num_tokens
            if sequence.num_computed < sequence.num_tokens:
                continue
            del self._prefilling[sequence]
            sequence.num_emitted += 1
            self.num_output_tokens_total += 1
            if sequence.num_emitted == sequence.num_output:
                finished.append(sequence)
                continue
            self._decoding.join(sequence)
            if sequence.num_emitted == 1:
                progress.append(self._progress(sequence, finished=False))
        # Blocks are released, and so evicted, in the order of running.
        for sequence in sorted(finished, key=lambda each: each.admission):
            self._finish(sequence, progress)
        for sequence in self._stalled:
            self._decoding.join(sequence)
        self._prefills.clear()
        self._stalled.clear()
        if self._aborted:
            gone = set(self._aborted)
            self._aborted.clear()
            progress = [each for each in progress if each.job_id not in gone]
            for job_id in gone:
                self._drop(job_id)
        return progress

    def snapshot(self, seq: int, last_booking: int) -> EngineSnapshot:
        """The state after the last step, or after the last one settled."""
        pending = self._waiting.num_tokens
        demand = self._waiting.num_demand_tokens
        for sequence in self._prefilling:
            num_left = sequence.num_tokens - sequence.num_computed
            pending += num_left
            demand += min(num_left, self._chunk)
        num_context = self._decoding.num_context_tokens
        for sequence in self._stalled:
            num_context += sequence.num_tokens
        num_free = self.kv.num_free
        return EngineSnapshot(
            seq=seq,
            last_booking=last_booking,
            num_running_reqs=len(self._running),
            num_waiting_reqs=len(self._waiting),
            num_inflight_reqs=len(self._jobs),
            kv_cache_usage=1.0 - num_free / self.kv.num_blocks,
            num_free_kv_tokens=num_free * self._block_size,
            num_pending_prefill_tokens=pending,
            num_step_demand_tokens=demand,
            num_decoding_reqs=self._decoding.num_sequences + len(self._stalled),
            num_decode_context_tokens=num_context,
            prefill_tokens_per_s=(
                self._prefill_rate_tokens / self._prefill_rate_s if self._prefill_rate_s else 0.0
            ),
            step_s=self.step_s,
            step_num_prefill_tokens=self.step_num_prefill_tokens,
            step_num_decode_reqs=self.step_num_decode_reqs,
            num_prefill_tokens_total=self.num_prefill_tokens_total,
            num_prefix_queries_total=self.num_prefix_queries_total,
            num_prefix_hits_total=self.num_prefix_hits_total,
            num_preemptions_total=self.num_preemptions_total,
            num_output_tokens_total=self.num_output_tokens_total,
            num_steps_total=self.num_steps_total,
        )

    # Runs of steps in which all that happens is that everybody decodes

    def _begin_run(self, now_s: float, until_s: float) -> float:
        decoding, kv = self._decoding, self.kv
        num_decoding, num_context = decoding.num_sequences, decoding.num_context_tokens
        fixed_s = self.profile.step_s(0, num_decoding, 0, 0.0)
        s_per_context_token = self.profile.s_per_context_token
        is_noisy = self.profile.noise > 0.0
        num_steps = decoding.next_finish_tick() - decoding.tick
        kv.take(decoding.num_new_blocks())
        num_free = kv.num_free
        ends_s, end_s = self._ends_s, now_s
        while True:
            step_s = self.slowness * (fixed_s + s_per_context_token * num_context)
            end_s += self._noise(len(ends_s)) * step_s if is_noisy else step_s
            ends_s.append(end_s)
            num_context += num_decoding
            num_free -= decoding.num_new_blocks(len(ends_s))
            if end_s >= until_s or len(ends_s) == num_steps or num_free < 0:
                return end_s - now_s

    def _account(self, num_steps: int) -> None:
        """The bookkeeping of one step that has ended, or of more in which all only decoded."""
        last = self._num_settled + num_steps - 1
        self.step_s = self._ends_s[last] - (self._ends_s[last - 1] if last else self._began_s)
        self._num_settled += num_steps
        if self._factors:
            for _ in range(num_steps):
                self._factors.popleft()
        num_prefill_tokens = sum(self._prefills.values())
        self.step_num_prefill_tokens = num_prefill_tokens
        self.step_num_decode_reqs = self._decoding.num_sequences
        self.num_prefill_tokens_total += num_prefill_tokens
        if num_prefill_tokens:
            keep = 1.0 - _RATE_FORGETTING
            self._prefill_rate_tokens = keep * self._prefill_rate_tokens + num_prefill_tokens
            self._prefill_rate_s = keep * self._prefill_rate_s + self.step_s
        self.num_steps_total += num_steps
        self._decoding.advance(num_steps)
        self.num_output_tokens_total += num_steps * self._decoding.num_sequences

    def _noise(self, index: int) -> float:
        """The factor on the step that comes so many after the last one settled."""
        if (noise := self.profile.noise) == 0.0:
            return 1.0
        while len(self._factors) <= index:
            self._factors.append(max(0.0, self._rng.gauss(1.0, noise)))
        return self._factors[index]

    # Scheduling

    def _schedule(self) -> None:
        """Choose what the step computes; allocate its blocks."""
        budget = self.profile.max_num_batched_tokens
        alone = len(self._running) + len(self._waiting) <= 1
        chunk = budget if alone and not self._paces else self._chunk
        self._deferred = self._to_defer() if self._paces else []
        for sequence in self._deferred:
            del self._prefilling[sequence], self._running[sequence]
        self._fill(budget, chunk)
        if self._deferred:
            # First again among those that run, as vLLM has them.
            self._running = dict.fromkeys(self._deferred) | self._running
            self._prefilling = dict.fromkeys(self._deferred) | self._prefilling

    def _to_defer(self) -> list[Sequence]:
        """The long prompts that this step does without; never two steps in a row."""
        num_here = len(self._running) + len(self._waiting)
        if self._deferred or not self._waiting or num_here > self.profile.max_num_seqs:
            return []
        urgent = self._waiting.head().job.priority
        return [
            sequence
            for sequence in self._prefilling
            if sequence.job.priority > urgent
            and not sequence.num_emitted
            and sequence.num_tokens - sequence.num_computed > self._chunk
        ]

    def _fill(self, budget: int, chunk: int) -> None:
        num_new_blocks = self._decoding.num_new_blocks()
        demand = self._decoding.num_sequences
        for sequence in self._prefilling:
            num_tokens = min(chunk, sequence.num_tokens - sequence.num_computed)
            demand += num_tokens
            num_new_blocks += self._num_missing(sequence, sequence.num_computed + num_tokens)
        if demand <= budget and num_new_blocks <= self.kv.num_free:
            # All of them fit: then their order does not matter.
            self.kv.take(self._decoding.num_new_blocks())
            for sequence in self._prefilling:
                num_tokens = min(chunk, sequence.num_tokens - sequence.num_computed)
                self._compute(sequence, num_tokens)
            self._admit(budget - demand, chunk)
            return
        preempted, budget = self._schedule_in_order(budget, chunk)
        if not preempted:
            self._admit(budget, chunk)

    def _schedule_in_order(self, budget: int, chunk: int) -> tuple[bool, int]:
        """Running sequences one by one, as vLLM does; whether one was preempted, budget left."""
        chosen: dict[Sequence, int] = {}
        preempted = False
        for sequence in list(self._running):
            if budget <= 0:
                break
            if sequence not in self._running:  # preempted in this very pass
                continue
            if sequence.state is State.DECODE:
                num_tokens, num_computed = 1, self._decoding.num_computed(sequence)
            else:
                num_computed = sequence.num_computed
                num_tokens = min(chunk, sequence.num_tokens - num_computed, budget)
            num_blocks = self._num_missing(sequence, num_computed + num_tokens)
            while num_blocks > self.kv.num_free:
                victim = self._victim()
                budget += chosen.pop(victim, 0)
                self._preempt(victim)
                preempted = True
                if victim is sequence:
                    break
            if sequence not in self._running:
                break
            self.kv.extend(sequence.lease, num_blocks)
            chosen[sequence] = num_tokens
            budget -= num_tokens
        for sequence in self._running:
            num_tokens = chosen.get(sequence, 0)
            if sequence.state is State.PREFILL:
                if num_tokens:
                    self._compute(sequence, num_tokens)
            elif not num_tokens:
                self._stalled.append(sequence)
        for sequence in self._stalled:
            self._decoding.leave(sequence)
            sequence.state = State.STALLED
        return preempted, budget

    def _admit(self, budget: int, chunk: int) -> None:
        kv, size = self.kv, self._block_size
        while budget > 0 and self._waiting and len(self._running) < self.profile.max_num_seqs:
            sequence = self._waiting.head()
            if self._blocked == (sequence, kv.epoch):
                return
            num_tokens = sequence.num_tokens
            # The last token is computed in any case: its logits are wanted.
            hit = kv.look_up(sequence.lease, (num_tokens - 1) // size)
            if -(-num_tokens // size) - hit.num_blocks + hit.num_evictable > kv.num_free:
                self._blocked = sequence, kv.epoch
                return
            self._waiting.remove(sequence)
            kv.adopt(sequence.lease, hit)
            num_hit_tokens = hit.num_blocks * size
            if not sequence.num_preemptions:
                self.num_prefix_queries_total += num_tokens
                self.num_prefix_hits_total += num_hit_tokens
                sequence.num_cached = num_hit_tokens
            sequence.num_computed = num_hit_tokens
            sequence.state = State.PREFILL
            self._num_admissions += 1
            sequence.admission = self._num_admissions
            self._running[sequence] = None
            self._prefilling[sequence] = None
            num_new_tokens = min(num_tokens - num_hit_tokens, chunk, budget)
            self._compute(sequence, num_new_tokens)
            budget -= num_new_tokens

    def _compute(self, sequence: Sequence, num_tokens: int) -> None:
        """Put a chunk of a prefill into the step."""
        num_computed = sequence.num_computed + num_tokens
        self.kv.extend(sequence.lease, self._num_missing(sequence, num_computed))
        # As soon as it is scheduled: what follows it in this step may share it.
        self.kv.commit(sequence.lease, num_computed // self._block_size)
        self._prefills[sequence] = num_tokens

    def _num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that so many computed tokens need and the sequence has not."""
        if sequence.state is State.DECODE:
            self._decoding.sync(sequence)
        return max(0, -(-num_tokens // self._block_size) - self.kv.num_held(sequence.lease))

    def _victim(self) -> Sequence:
        if not self._priority:
            return next(reversed(self._running))
        return max(self._running, key=lambda each: (each.job.priority, each.serial))

    def _preempt(self, sequence: Sequence) -> None:
        if sequence.state is State.DECODE:
            self._decoding.leave(sequence)
        else:
            del self._prefilling[sequence]
        del self._running[sequence]
        self.kv.release(sequence.lease, sequence.num_computed // self._block_size)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.num_preemptions_total += 1
        if self._priority:
            self._waiting.push(sequence, (float(sequence.job.priority), sequence.serial))
        else:
            self._num_prepended += 1
            self._waiting.push(sequence, (-1.0, -self._num_prepended))

    # Comings and goings

    def _progress(self, sequence: Sequence, finished: bool) -> Progress:
        return Progress(
            sequence.job.id,
            sequence.index,
            sequence.num_emitted,
            finished,
            sequence.num_cached,
            sequence.num_preemptions,
        )

    def _finish(self, sequence: Sequence, progress: list[Progress]) -> None:
        progress.append(self._progress(sequence, finished=True))
        self._end(sequence)
        sequences = self._jobs[sequence.job.id]
        if all(each.state is State.DONE for each in sequences):
            del self._jobs[sequence.job.id]

    def _end(self, sequence: Sequence) -> None:
        sequence.state = State.DONE
        del self._running[sequence]
        self.kv.release(sequence.lease, sequence.num_computed // self._block_size)

    def _drop(self, job_id: str) -> None:
        for sequence in self._jobs.pop(job_id, ()):
            if sequence.state is State.DONE:
                continue
            if sequence.state is State.WAITING:
                self._waiting.remove(sequence)
                sequence.state = State.DONE
                continue
            if sequence.state is State.DECODE:
                self._decoding.leave(sequence)
            else:
                del self._prefilling[sequence]
            self._end(sequence)
