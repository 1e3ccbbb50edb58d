"""What does this gateway know of one engine? All that a policy sees of it."""

import math
import random

import msgspec

from router.estimators.adapter_load import Adapters
from router.estimators.prefill_rate import PrefillRate
from router.estimators.request_overhead import RequestOverhead
from router.estimators.step_time import LATE_SHARE, StepModel, StepModelState
from router.fleet.ledger import Ledger, LedgerState, peak_growth_tokens
from router.fleet.prefix_cache import PrefixCache
from router.fleet.step_budget import step_prefill_tokens
from router.fleet.vital_signs import VitalSigns
from router.resilience.breaker import Breaker, BreakerView
from router.resilience.settings import BreakerSettings
from router.types import AdapterState, EngineInfo, EngineSnapshot, Request

Kind = tuple[str, str, int]  # model, device, tokens in one step


class ReplicaState(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an engine, and predicted by it."""

    info: EngineInfo
    snapshot: EngineSnapshot | None  # None before the first one
    age_s: float  # of the snapshot, or of the connection while there is none
    is_draining: bool
    is_quarantined: bool  # takes nothing new until a suspect has its answer
    is_mute: bool  # lives, but sends no snapshots; takes nothing new until it does
    breaker: BreakerView
    ledger: LedgerState
    num_pending_prefill_tokens: int  # in the engine and on their way to it
    num_free_kv_tokens: int  # left when all that is pending is prefilled; may be < 0
    num_cached_blocks: int
    step_model: StepModelState
    path_s: float  # usual time of a request outside of steps
    prefill_tokens_per_s: float  # in full steps
    ttft_s: float  # predicted for the shortest prompt
    adapters: AdapterState | None = None  # of LoRA; None where it takes none


class Life(msgspec.Struct, eq=False, weakref=True):
    """What a policy keeps weakly in place of a replica, of whose compiled class it cannot."""


class Replica:
    """Last snapshot, bookings since, and what both predict.

    The attributes from `num_pending_prefill_tokens` on are derived. They are
    computed once per change (`receive`, `book`, `release`), because a decision
    reads them for every engine while a change touches one.
    """

    __slots__ = (
        "_first_long_edf_key_s",
        "_is_at_work",
        "_is_backlogged",
        "_prefill_rate",
        "_prefill_start_s",
        "_rest_tokens",
        "_short_ahead_tokens",
        "_step_end_s",
        "_step_start_s",
        "_waiting_keys_s",
        "adapters",
        "breaker",
        "chunk_overhead_s",
        "chunk_tokens",
        "decode_s",
        "id",
        "info",
        "is_draining",
        "is_quarantined",
        "ledger",
        "life",
        "long_edf_keys_s",
        "max_prefill_chunk",
        "names",
        "num_decoding",
        "num_free_kv_tokens",
        "num_pending_prefill_tokens",
        "num_sequences",
        "num_step_demand_tokens",
        "predictor",
        "prefill_tokens_per_s",
        "prefix_cache",
        "request_overhead",
        "room_tokens",
        "snapshot",
        "snapshot_s",
        "step_base_s",
        "token_s",
        "up_s",
        "vital_signs",
    )

    def __init__(
        self, replica_id: str, info: EngineInfo, now_s: float, breaker: Breaker | None = None
    ) -> None:
        self.id = replica_id
        self.life = Life()
        self.info = info
        self.up_s = now_s  # since when there is this connection
        self.breaker = breaker or Breaker(BreakerSettings(), random.Random(0), now_s)
        self.names = frozenset((info.model, *info.aliases))
        self.max_prefill_chunk = info.max_prefill_chunk
        # Until it reports, an engine is taken to be empty: it has just been started,
        # or its first snapshot is already on its way.
        self.snapshot = EngineSnapshot(seq=-1, num_free_kv_tokens=info.num_kv_tokens)
        self.snapshot_s = now_s  # when received
        self.vital_signs = VitalSigns(info.heartbeat_s)
        self.ledger = Ledger()
        self.predictor = StepModel()
        self._prefill_rate = PrefillRate()
        self.request_overhead = RequestOverhead()  # `Fleet` shares it by kind
        self.prefix_cache = PrefixCache()
        self.adapters = Adapters(info.max_loras, info.adapters) if info.max_loras else None
        # EDF keys of the prompts sent here that one step cannot take and that are not prefilled
        # yet, by request id.
        self.long_edf_keys_s: dict[str, float] = {}
        self._first_long_edf_key_s = math.inf
        self._waiting_keys_s: list[float] | None = None  # computed when it is asked for
        self.is_draining = False  # finishes what it has, takes nothing new
        self.is_quarantined = False  # a suspect has it: `router.scheduling.quarantine`

        self.num_pending_prefill_tokens = 0  # in the engine and on their way to it
        self.num_step_demand_tokens = 0  # of these, what the next step would like to compute
        self.num_free_kv_tokens = 0  # left when all that is pending is prefilled; may be < 0
        # The same when what runs has grown as predicted; without limit while the engine is empty.
        self.room_tokens = math.inf
        self.num_sequences = 0  # in the scheduler and on their way to it
        self.chunk_tokens = 1  # prefilled in one full step
        self.chunk_overhead_s = 0.0  # what a step costs besides prefill
        self.token_s = 0.0  # what each prefilled token adds to it
        self.decode_s = 0.0  # and each decoding sequence
        self.step_base_s = 0.0  # without any of both
        self.num_decoding = 0  # sequences, as of the snapshot
        self.prefill_tokens_per_s = 0.0  # in full steps
        self._rest_tokens = 0  # pending after the current step
        self._short_ahead_tokens = 0  # of these, those before a short prompt
        self._is_backlogged = False  # pending after the current step is more than the next one's
        self._is_at_work = False  # has something to run, as of the snapshot
        self._step_start_s = now_s  # when the current step began, if it is at work
        self._step_end_s = 0.0  # when the current step should end
        self._prefill_start_s = math.inf  # when it began, if it has prefill
        self._derive_rates()

    @property
    def kind(self) -> Kind:
        """What its step times depend on, as far as it says: engines of one kind take as long."""
        return self.info.model, self.info.device, self.info.max_num_batched_tokens

    def start_from(self, model: StepModel) -> None:
        """Predict by what another engine has learned until it has enough steps of its own."""
        self.predictor.start_from(model)
        self._derive_rates()

    def num_new_tokens(self, request: Request) -> int:
        """Return the prompt tokens that the engine would have to prefill for a request, ≥ 1."""
        if not (request.block_hashes or self.prefix_cache.coming):
            return request.num_prompt_tokens or 1  # the usual case, read for every engine
        return max(1, request.num_prompt_tokens - self.prefix_cache.num_tokens(request))

    def is_short(self, num_new_tokens: float) -> bool:
        """Whether a prompt passes the long ones that the engine is prefilling.

        Where the engine gives no prompt more than `max_prefill_chunk` tokens of a step and this one
        needs no more. Where steps are limited as a whole none is (docs/routing.md).
        """
        return num_new_tokens <= self.max_prefill_chunk

    def ttft_s(self, num_new_tokens: int, now_s: float, edf_key_s: float = -math.inf) -> float:
        """Return the predicted seconds until a prompt of so many new tokens is prefilled here.

        The rest of the current step, which a newcomer cannot join, then whole steps until what
        comes before it and its own tokens are prefilled (formula: `router.estimators.step_time`,
        with `LATE_SHARE` of a step that is late). Before it comes all that is pending. Where
        engines give a prompt a chunk of each step, and more than a step is pending, a short one
        passes the long ones but for one chunk of lower EDF key, and a long one shares the steps of
        its chunks with those before it. A wait for KV blocks is not included.
        """
        # Read for every engine at every decision, hence no calls in here.
        chunk, num_tokens, num_chunks = self.max_prefill_chunk, self._rest_tokens, 0
        if num_new_tokens <= chunk:
            if self._is_backlogged:
                num_ahead = self._short_ahead_tokens
                if edf_key_s >= self._first_long_edf_key_s:
                    num_ahead += chunk
                if num_ahead < num_tokens:
                    num_tokens = num_ahead
        elif chunk:
            # Those before it take a chunk of each step, too, and go on behind it.
            num_chunks = -(-num_new_tokens // chunk)
            num_ahead = num_chunks * self.num_step_demand_tokens
            if num_ahead < num_tokens:
                num_tokens = num_ahead
        num_tokens += num_new_tokens
        num_steps = -(-num_tokens // self.chunk_tokens)
        if num_chunks > num_steps:
            num_steps = num_chunks
        ttft_s = num_steps * self.chunk_overhead_s + num_tokens * self.token_s
        rest_s = self._step_end_s - now_s
        late_s = (now_s - self._prefill_start_s) * LATE_SHARE
        rest_s = rest_s if rest_s > late_s else late_s
        return ttft_s + rest_s if rest_s > 0.0 else ttft_s

    def passing_s(self, num_new_tokens: int, edf_key_s: float) -> float:
        """Return the predicted seconds that prompts here wait for this one, summed over them.

        Those of a higher EDF key that the current step does not end. Where engines give a prompt
        a chunk of each step, the long ones, where more is pending than a step.
        """
        if self._rest_tokens <= 0 or (self.max_prefill_chunk and not self._is_backlogged):
            return 0.0
        keys_s = self._waiting_keys_s
        if keys_s is None:
            if self.max_prefill_chunk:
                keys_s = list(self.long_edf_keys_s.values())
            else:
                keys_s = self.ledger.waiting_keys_s(self._rest_tokens)
            self._waiting_keys_s = keys_s
        num_passed = 0
        for key_s in keys_s:
            num_passed += key_s > edf_key_s
        return num_passed * num_new_tokens * self.token_s

    def tpot_s(self, num_more: int) -> float:
        """Return the predicted seconds per output token with so many more sequences decoding here.

        A step without prefill, made longer by the share of time that prefill has taken lately.
        No longer than if every step were full of prefill.
        """
        num_decoding = self.snapshot.num_decoding_reqs + self.ledger.num_sequences + num_more
        step_s = self.predictor.step_s(0, num_decoding)
        full_step_s = step_s + self.chunk_tokens * self.token_s
        share = 1.0 - self._prefill_rate.tokens_per_s * self.token_s  # that is left for decoding
        return step_s / share if step_s < share * full_step_s else full_step_s

    def step_wait_s(self, now_s: float) -> tuple[float, float]:
        """Return the seconds since its last sign of progress, and what a step should take.

        Zeros while it has nothing to run, as far as it has reported.
        """
        if not (self._is_at_work and self.snapshot.num_inflight_reqs):
            return 0.0, 0.0
        waited_s = now_s - max(self._step_start_s, self.vital_signs.progress_s)
        return waited_s, self._step_end_s - self._step_start_s

    def receive(self, snapshot: EngineSnapshot, now_s: float) -> bool:
        """Install a newer snapshot. Return False if it was stale."""
        if snapshot.seq <= self.snapshot.seq:
            return False
        # Not every snapshot ends a step: some only report requests that were read.
        was_idle = not self._is_at_work
        if was_idle or snapshot.num_steps_total != self.snapshot.num_steps_total:
            self._step_start_s = now_s
        self.snapshot = snapshot
        self.snapshot_s = now_s
        self.vital_signs.receive_snapshot(now_s)
        self.ledger.acknowledge(snapshot.last_booking)
        self.predictor.learn(snapshot)
        self._prefill_rate.record_total(snapshot.num_prefill_tokens_total, now_s)
        if (paths := snapshot.adapter_paths) is not None:
            self.info = self.info.with_adapters(paths)
            self.names = frozenset((self.info.model, *self.info.aliases))
            if self.adapters is not None:
                self.adapters.use_paths(paths)
        if snapshot.adapters is not None and self.adapters is not None:
            self.adapters.learn(snapshot.adapters)
        self._derive_rates()
        return True

    def book(
        self,
        request: Request,
        num_kv_tokens: int,
        now_s: float,
        num_cached_tokens: int = 0,
        num_used_tokens: int = 0,
    ) -> int:
        """Count a request here from now on. Return its booking number.

        Of its KV tokens so many are expected to be cached here, which is free room until it is
        used, and so many of these are used by others. What was not cached makes the cache grow.
        """
        num_new_tokens = max(1, request.num_prompt_tokens - num_cached_tokens)
        number = self.ledger.book(
            request.id,
            num_prefill_tokens=num_new_tokens,
            num_step_tokens=min(num_new_tokens, self.max_prefill_chunk or num_new_tokens),
            num_kv_tokens=num_kv_tokens - num_used_tokens,
            num_own_kv_tokens=max(0, num_kv_tokens - num_cached_tokens),
            num_sequences=request.num_sequences,
            edf_key_s=request.edf_key_s,
            now_s=now_s,
        )
        if 0 < self.max_prefill_chunk < num_new_tokens:
            self.long_edf_keys_s[request.id] = request.edf_key_s
            self._first_long_edf_key_s = min(self._first_long_edf_key_s, request.edf_key_s)
        self._derive_load()
        return number

    def end_prefill(self, request_id: str) -> None:
        """Stop counting a prompt that is prefilled, or never will be; ignore unknown ids."""
        self.ledger.end_prefill(request_id)
        self._waiting_keys_s = None
        if self.long_edf_keys_s.pop(request_id, None) is not None:
            self._first_long_edf_key_s = min(self.long_edf_keys_s.values(), default=math.inf)

    def release(self, request_id: str) -> None:
        """Stop counting a request here; an unknown id changes nothing."""
        self.ledger.release(request_id)
        self.end_prefill(request_id)
        self._derive_load()

    def state(self, now_s: float) -> ReplicaState:
        """Return what is known and predicted."""
        return ReplicaState(
            info=self.info,
            snapshot=self.snapshot if self.snapshot.seq >= 0 else None,
            age_s=max(0.0, now_s - self.snapshot_s),
            is_draining=self.is_draining,
            is_quarantined=self.is_quarantined,
            is_mute=self.vital_signs.is_mute,
            breaker=self.breaker.state(now_s),
            ledger=self.ledger.state(),
            num_pending_prefill_tokens=self.num_pending_prefill_tokens,
            num_free_kv_tokens=self.num_free_kv_tokens,
            num_cached_blocks=len(self.prefix_cache),
            step_model=self.predictor.state(),
            path_s=self.request_overhead.usual_s,
            prefill_tokens_per_s=self.prefill_tokens_per_s,
            ttft_s=self.ttft_s(1, now_s),
            adapters=self.adapters.state() if self.adapters is not None else None,
        )

    def _derive_rates(self) -> None:
        """Compute anew what follows from the snapshot and from what is learned of steps."""
        predictor, num_decoding = self.predictor, self.snapshot.num_decoding_reqs
        self.num_decoding = num_decoding
        info = self.info
        self.chunk_overhead_s = predictor.step_s(0, num_decoding)
        self.token_s = predictor.token_s
        self.chunk_tokens = step_prefill_tokens(
            self.chunk_overhead_s,
            self.token_s,
            info.itl_target_s,
            info.max_num_batched_tokens - num_decoding,
        )
        self.decode_s = predictor.decode_s
        self.step_base_s = predictor.step_base_s
        full_step_s = self.chunk_overhead_s + self.chunk_tokens * self.token_s
        self.prefill_tokens_per_s = self.chunk_tokens / max(1e-9, full_step_s)
        self._derive_load()

    def _derive_load(self) -> None:
        """Compute anew what also follows from the bookings."""
        snapshot, ledger = self.snapshot, self.ledger
        num_pending = snapshot.num_pending_prefill_tokens
        num_scheduled = snapshot.num_running_reqs + snapshot.num_waiting_reqs
        num_free = snapshot.num_free_kv_tokens
        self.num_pending_prefill_tokens = num_pending + ledger.num_prefill_tokens
        num_demand = snapshot.num_step_demand_tokens or num_pending
        self.num_step_demand_tokens = num_demand + ledger.num_step_tokens
        # vLLM allocates blocks chunk by chunk: what is pending has yet to take its own.
        self.num_free_kv_tokens = num_free - num_pending - ledger.num_kv_tokens
        self.num_sequences = num_scheduled + ledger.num_sequences
        # What does not fit an empty engine never will: nothing is gained by holding it.
        is_empty = not (self.num_sequences or self.num_pending_prefill_tokens)
        num_used = self.info.num_kv_tokens - num_free + num_pending
        num_growth = peak_growth_tokens(
            ledger.num_acknowledged_sequences,
            num_used,
            ledger.num_acknowledged_own_kv_tokens - num_used,
        )
        self.room_tokens = math.inf if is_empty else self.num_free_kv_tokens - num_growth

        # The current step began when the last one ended, about when that was reported.
        # An engine that was idle then began with the first request it got since.
        chunk_tokens = self.chunk_tokens
        self._is_at_work = bool(num_pending or num_scheduled)
        first = ledger.oldest_unacknowledged
        if self._is_at_work:
            # Limited as a whole, a step computes all that is pending, as far as it goes.
            num_in_step = num_demand if self.max_prefill_chunk else num_pending
            step_tokens, step_start_s = min(num_in_step, chunk_tokens), self._step_start_s
        elif first is not None:
            step_tokens, step_start_s = min(first.num_step_tokens, chunk_tokens), first.booked_s
        else:
            step_tokens, step_start_s = 0, -math.inf
        self._rest_tokens = self.num_pending_prefill_tokens - step_tokens
        self._waiting_keys_s = None
        self._is_backlogged = self._rest_tokens > chunk_tokens
        # The demand in the snapshot is what the current step computes, up to its budget.
        num_left_over = max(0, num_demand - chunk_tokens)
        self._short_ahead_tokens = num_left_over + ledger.num_step_tokens
        self._prefill_start_s = step_start_s if step_tokens else math.inf
        self._step_end_s = step_start_s + self.chunk_overhead_s + step_tokens * self.token_s
