"""What does each step of an engine compute? vLLM's continuous batching.

Follows `Scheduler.schedule` of vLLM 0.32 (v1/core/sched/scheduler.py): one token budget per step;
running sequences first, in the order of their admission, then waiting ones; chunked prefill; a
whole prompt must fit into free KV blocks before it is admitted; a running sequence that finds no
block preempts the last one, or the least urgent, which is recomputed later. Not modelled:
asynchronous scheduling, under which a new sequence can wait one step more.
"""

from router.fleet.step_budget import MAX_AHEAD, StepBudget, gives_way, long_part_tokens
from router.simulation.engine.decode_batch import DecodeBatch
from router.simulation.engine.kv_cache import KvCache
from router.simulation.engine.profile import Profile
from router.simulation.engine.sequence import DECODE, DONE, PREFILL, WAITING, Sequence, State
from router.simulation.engine.waiting import WaitingSequences


class StepScheduler:
    """The sequences of one engine, and which of them the next step computes.

    The caller alternates `schedule` and `complete`; in between, `decoding.advance` stands for steps
    in which all sequences decode.

    `budget`: schedule as `serving.engine.vllm.scheduler` does, not as vLLM alone: a step prefills
    no more than it says, ends with the prompts after which that is best (`cut_after`), and
    prompts that run give way to others (`gives_way`), never in two steps in a row.
    """

    def __init__(
        self,
        profile: Profile,
        segment_blocks: int,
        *,
        priority: bool,
        budget: StepBudget | None = None,
    ) -> None:
        self.kv = KvCache(profile.num_kv_blocks, segment_blocks)
        self.decoding = DecodeBatch(self.kv, profile.block_size)
        self.waiting = WaitingSequences(profile.max_prefill_chunk or profile.max_num_batched_tokens)
        self.running: dict[Sequence, None] = {}
        self.prefills: dict[Sequence, int] = {}  # tokens in this step
        self.num_prefix_queries_total = 0
        self.num_prefix_hits_total = 0
        self.num_preemptions_total = 0
        self._profile = profile
        self._priority = priority
        self._budget = budget
        self._block_size = profile.block_size
        self._chunk = profile.max_prefill_chunk or profile.max_num_batched_tokens
        self._deferred: list[Sequence] = []  # left out of the current step
        self._num_prepended = 0
        self._num_admissions = 0
        self._prefilling: dict[Sequence, None] = {}
        self._stalled: list[Sequence] = []  # decoding, yet not in the current step
        # The head that did not fit, and the cache's epoch at that time.
        self._blocked: Sequence | None = None
        self._blocked_epoch = 0

    # Sequences

    def add(self, sequence: Sequence) -> None:
        """Add a sequence to those that wait."""
        urgency = sequence.job.priority if self._priority else 0
        self.waiting.push(sequence, (float(urgency), sequence.serial))

    def drop(self, sequence: Sequence) -> None:
        """Remove a sequence between two steps; one that is done has been removed already."""
        if sequence.state is DONE:
            return
        if sequence.state is WAITING:
            self.waiting.remove(sequence)
            sequence.state = DONE
            return
        if sequence.state is DECODE:
            self.decoding.remove(sequence)
        else:
            del self._prefilling[sequence]
        self._end(sequence)

    # Work that is left

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting

    @property
    def only_decodes(self) -> bool:
        """Whether the next step decodes all sequences and does nothing else."""
        return not (
            self._prefilling
            or self.waiting
            or self.decoding.num_new_blocks() > self.kv.num_free
            or self.decoding.num_sequences > self._profile.max_num_batched_tokens
        )

    @property
    def num_decoding(self) -> int:
        return self.decoding.num_sequences + len(self._stalled)

    @property
    def num_decode_context_tokens(self) -> int:
        return self.decoding.num_context_tokens + sum(each.num_tokens for each in self._stalled)

    def pending_tokens(self) -> tuple[int, int]:
        """Return the tokens yet to prefill, and how many of them the next step would compute."""
        pending, chunk = self.waiting.num_tokens, self._chunk
        if self._budget is None:
            demand = self.waiting.num_demand_tokens
        else:
            part = long_part_tokens(self._budget.prefill_tokens(self.decoding.num_sequences))
            chunk = min(chunk, part)
            demand = self.waiting.demand_tokens(chunk)
        for sequence in self._prefilling:
            num_left = sequence.num_tokens - sequence.num_computed
            pending += num_left
            demand += min(num_left, chunk)
        return pending, demand

    # Steps

    def complete(self) -> tuple[list[Sequence], list[Sequence]]:
        """End the step; return the sequences whose prompt is now computed, and those done."""
        finished = self.decoding.remove_finished()
        computed = []
        for sequence, num_tokens in self.prefills.items():
            sequence.num_computed += num_tokens
            if sequence.num_computed < sequence.num_tokens:
                continue
            del self._prefilling[sequence]
            sequence.num_emitted += 1
            computed.append(sequence)
            if sequence.num_emitted == sequence.num_output:
                finished.append(sequence)
            else:
                self.decoding.add(sequence)
        if len(finished) > 1:  # blocks are released, and so evicted, in the order of running
            finished.sort(key=lambda each: each.admission)
        for sequence in finished:
            self._end(sequence)
        for sequence in self._stalled:
            self.decoding.add(sequence)
        if self.prefills:
            self.prefills.clear()
        if self._stalled:
            self._stalled.clear()
        return computed, finished

    def schedule(self) -> None:
        """Choose what the step computes; allocate its blocks."""
        num_tokens = self._profile.max_num_batched_tokens
        alone = len(self.running) + len(self.waiting) <= 1
        if self._budget is None:
            self._fill(num_tokens, num_tokens if alone else self._chunk)
            return
        self._put_prompts_last()
        num_decoding = self.decoding.num_sequences
        num_prefill = self._budget.prefill_tokens(num_decoding)
        self._deferred, num_prefill = self._planned(num_prefill)
        for sequence in self._deferred:
            del self._prefilling[sequence], self.running[sequence]
        self._fill(min(num_tokens, num_prefill + num_decoding), min(num_prefill, self._chunk))
        if self._deferred:
            # First again among those that run, as in `serving.engine.vllm.scheduler`.
            self.running = dict.fromkeys(self._deferred) | self.running
            self._prefilling = dict.fromkeys(self._deferred) | self._prefilling

    def _put_prompts_last(self) -> None:
        """Order what runs: those that decode, which always get their token, then by urgency."""
        for sequence in sorted(self._prefilling, key=_urgency):
            del self.running[sequence], self._prefilling[sequence]
            self.running[sequence] = self._prefilling[sequence] = None

    def _planned(self, num_prefill: int) -> tuple[list[Sequence], int]:
        """Return the prompts to leave out of this step, and the tokens that it prefills."""
        assert self._budget is not None
        has_room = len(self.running) + len(self.waiting) <= self._profile.max_num_seqs
        if self._priority and self.waiting:
            prompts = [(each, each.num_tokens - each.num_computed) for each in self._prefilling]
            prompts += [(each, each.num_tokens) for each in self.waiting.first(MAX_AHEAD)]
            prompts.sort(key=_urgency_of_first)  # equal ones: who runs, then who came first
            num_left = [num for _, num in prompts]
            cut = self._budget.cut_after(num_left, num_prefill, self.decoding.num_sequences)
            left_out = [each for each, _ in prompts[cut:] if each.state is PREFILL]
            if cut and (not left_out or (has_room and not self._deferred)):
                return left_out, sum(num_left[:cut])
        return self._to_defer(num_prefill), num_prefill

    def _to_defer(self, num_prefill: int) -> list[Sequence]:
        """Return the prompts to leave out of this step; none if the last one left any out."""
        num_here = len(self.running) + len(self.waiting)
        if (
            self._deferred
            or not (self.waiting and self._prefilling)
            or num_here > self._profile.max_num_seqs
        ):
            return []
        head = self.waiting.head()
        num_left = sum(each.num_tokens - each.num_computed for each in self._prefilling)
        return [
            each
            for each in self._prefilling
            if gives_way(
                num_left, head.num_tokens, each.job.priority, head.job.priority, num_prefill
            )
        ]

    def _fill(self, budget: int, chunk: int) -> None:
        num_new_blocks = self.decoding.num_new_blocks()
        demand = self.decoding.num_sequences
        for sequence in self._prefilling:
            num_tokens = min(chunk, sequence.num_tokens - sequence.num_computed)
            demand += num_tokens
            num_new_blocks += self._num_missing(sequence, sequence.num_computed + num_tokens)
        if demand <= budget and num_new_blocks <= self.kv.num_free:
            # All of them fit: then their order does not matter.
            self.kv.allocate_blocks(self.decoding.num_new_blocks())
            for sequence in self._prefilling:
                num_tokens = min(chunk, sequence.num_tokens - sequence.num_computed)
                self._compute(sequence, num_tokens)
            self._admit(budget - demand, chunk)
            return
        preempted, budget = self._schedule_in_order(budget, chunk)
        if not preempted:
            self._admit(budget, chunk)

    def _schedule_in_order(self, budget: int, chunk: int) -> tuple[bool, int]:
        """Schedule running sequences one by one, as vLLM does.

        Return whether one was preempted, and the budget left, tokens.
        """
        chosen: dict[Sequence, int] = {}
        preempted = False
        for sequence in list(self.running):
            if budget <= 0:
                break
            if sequence not in self.running:  # preempted in this very pass
                continue
            if sequence.state is DECODE:
                num_tokens, num_computed = 1, self.decoding.num_computed(sequence)
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
            if sequence not in self.running:
                break
            self.kv.extend(sequence.block_table, num_blocks)
            chosen[sequence] = num_tokens
            budget -= num_tokens
        for sequence in self.running:
            num_tokens = chosen.get(sequence, 0)
            if sequence.state is PREFILL:
                if num_tokens:
                    self._compute(sequence, num_tokens)
            elif not num_tokens:
                self._stalled.append(sequence)
        for sequence in self._stalled:
            self.decoding.remove(sequence)
            sequence.state = State.STALLED
        return preempted, budget

    def _admit(self, budget: int, chunk: int) -> None:
        kv, size = self.kv, self._block_size
        while budget > 0 and self.waiting and len(self.running) < self._profile.max_num_seqs:
            sequence = self.waiting.head()
            if self._blocked is sequence and self._blocked_epoch == kv.epoch:
                return
            num_tokens = sequence.num_tokens
            # The last token is always computed, for its logits.
            hit = kv.look_up(sequence.block_table, (num_tokens - 1) // size)
            if -(-num_tokens // size) - hit.num_blocks + hit.num_evictable > kv.num_free:
                self._blocked, self._blocked_epoch = sequence, kv.epoch
                return
            self.waiting.remove(sequence)
            kv.adopt(sequence.block_table, hit)
            num_hit_tokens = hit.num_blocks * size
            if not sequence.num_preemptions:
                self.num_prefix_queries_total += num_tokens
                self.num_prefix_hits_total += num_hit_tokens
                sequence.num_cached = num_hit_tokens
            sequence.num_computed = num_hit_tokens
            sequence.state = PREFILL
            self._num_admissions += 1
            sequence.admission = self._num_admissions
            self.running[sequence] = None
            self._prefilling[sequence] = None
            num_new_tokens = min(num_tokens - num_hit_tokens, chunk, budget)
            self._compute(sequence, num_new_tokens)
            budget -= num_new_tokens

    def _compute(self, sequence: Sequence, num_tokens: int) -> None:
        """Add a chunk of a prefill to the step."""
        num_computed = sequence.num_computed + num_tokens
        self.kv.extend(sequence.block_table, self._num_missing(sequence, num_computed))
        # Already now: later sequences in this step may share it.
        self.kv.commit(sequence.block_table, num_computed // self._block_size)
        self.prefills[sequence] = num_tokens

    def _num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Return the blocks that so many computed tokens need beyond those of the sequence."""
        if sequence.state is DECODE:
            self.decoding.sync(sequence)
        return max(0, -(-num_tokens // self._block_size) - self.kv.num_held(sequence.block_table))

    def _victim(self) -> Sequence:
        if not self._priority:
            return next(reversed(self.running))
        return max(self.running, key=lambda each: (each.job.priority, each.serial))

    def _preempt(self, sequence: Sequence) -> None:
        if sequence.state is DECODE:
            self.decoding.remove(sequence)
        else:
            del self._prefilling[sequence]
        del self.running[sequence]
        self.kv.release(sequence.block_table, sequence.num_computed // self._block_size)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.num_preemptions_total += 1
        if self._priority:
            self.waiting.push(sequence, (float(sequence.job.priority), sequence.serial))
        else:
            self._num_prepended += 1
            self.waiting.push(sequence, (-1.0, -self._num_prepended))

    def _end(self, sequence: Sequence) -> None:
        sequence.state = DONE
        del self.running[sequence]
        self.kv.release(sequence.block_table, sequence.num_computed // self._block_size)


def _urgency_of_first(prompt: tuple[Sequence, int]) -> int:
    return prompt[0].job.priority


def _urgency(sequence: Sequence) -> int:
    return sequence.job.priority
