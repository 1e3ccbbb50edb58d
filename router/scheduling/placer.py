"""Which engine does a request go to, and when? Choosing and booking are one synchronous call.

Were they two, two requests would see the same idle engine between them.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

import msgspec

from router.fleet.admission import kv_need_tokens, max_known_tokens, meets_tpot_target
from router.fleet.fleet import Fleet
from router.fleet.prompt_blocks import PromptBlocks
from router.fleet.replica import Replica
from router.queueing.hold_queue import HoldQueue
from router.queueing.model_queue import queue_name
from router.resilience.breaker import BreakerState
from router.scheduling.attempt import Attempt, Attempts
from router.scheduling.backfill import Reservations
from router.scheduling.policies import Load, Policy
from router.scheduling.policies.headway import prefill_cost_s
from router.scheduling.quarantine import Quarantine
from router.types import Dispatch, Request, Usage

# Followers of a blocked head that are tried elsewhere: bounds the work per event
# (about 1 µs each). Engines are fed in the order of deadlines in any case; an engine
# that none of the first 32 fits has little room to fill.
_BACKFILL_DEPTH = 32

# A prefix that is worth waiting for takes an engine so many whole steps.
_STEPS_WORTH = 2

_HALF_OPEN: Final = BreakerState.HALF_OPEN  # looked up once: that costs 0.1 µs (Python 3.11)


class Placer:
    """Gives requests to engines: at once, or in the order of the hold queue.

    With `holds`, an engine gets work only while it accepts some and has KV room. For the
    head of a model's queue that no accepting engine has room for, one engine is reserved
    (`router.scheduling.backfill`). Followers may go to the other engines meanwhile, which
    does not delay the head. A head that KV has room for, and that only waits behind other
    long prompts, gets its reservation at its TTFT deadline; until then short prompts may
    pass it.
    """

    def __init__(
        self,
        fleet: Fleet,
        queue: HoldQueue,
        attempts: Attempts,
        policy: Policy,
        quarantine: Quarantine,
        tpot_targets_s: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.policy = policy
        self.holds = True
        self.prompts = PromptBlocks()
        self._fleet = fleet
        self._queue = queue
        self._attempts = attempts
        self._tpot_targets_s = tpot_targets_s
        self._quarantine = quarantine
        self._worth_tokens: float = math.inf  # of a prefix that is worth waiting for
        self._reservations = Reservations(fleet, queue)
        # By model: the front of its queue, and the least KV room that a follower there needs.
        self._least_needs: dict[str, tuple[list[Request], float]] = {}

    def fit_fleet(self) -> None:
        """Remember, and take for long, what suits the engines that there are now."""
        num_kv_tokens, max_model_len, step_tokens = self._fleet.sizes()
        self.prompts.fit(num_kv_tokens, max_model_len)
        self._worth_tokens = float(_STEPS_WORTH * step_tokens)

    def use_order(self, *, holds: bool, by_arrival: bool) -> bool:
        """Hold or not, and order by arrival or not, from now on; return whether that is news."""
        self.holds = holds
        if by_arrival == self._queue.by_arrival:
            return False
        self._queue.reorder(by_arrival=by_arrival)
        self._reservations.clear()
        return True

    def place(self, request: Request, now_s: float) -> Dispatch | None:
        """Choose and book an engine for the request. Return None if it has to wait."""
        need_tokens = kv_need_tokens(request)
        if request.is_suspect:
            alone_at = self._quarantine.engine_for(request, now_s)
            return None if alone_at is None else self._book(request, [alone_at], need_tokens, now_s)
        is_long = request.num_prompt_tokens >= self._worth_tokens and self.policy.wants_blocks
        if self.holds and not is_long and self._most_room(request.model) < need_tokens:
            return None  # the usual case while many are held, so checked first
        request = self._with_blocks(request)
        if self.holds:
            replicas = self._with_room(request, need_tokens)
            if is_long and request.block_ends and request.block_ends[-1] >= self._worth_tokens:
                replicas = self._beside_holders(request, replicas, need_tokens, now_s)
            elif replicas and request.model != replicas[0].info.model:
                replicas = self._beside_loaded(request, replicas, need_tokens)
        else:
            replicas = self._fleet.working(request.model)
        if request.only_at:
            replicas = [replica for replica in replicas if replica.id == request.only_at]
        elif request.has_begun:  # each kind keeps its own record of a reply
            external = request.begun_externally
            replicas = [each for each in replicas if each.info.is_external == external]
        if not replicas:
            return None
        if request.tried:  # elsewhere, if there is an elsewhere
            replicas = [r for r in replicas if r.id not in request.tried] or replicas
        if (self._tpot_targets_s or request.tpot_target_s is not None) and self.policy.holds:
            replicas = self._meeting_tpot_target(request, replicas)
        return self._book(request, replicas, need_tokens, now_s)

    def place_beside(self, attempt: Attempt, now_s: float) -> Dispatch | None:
        """Book a second engine for a request, if one has room for it at once."""
        request = attempt.request
        if request.only_at:
            return None
        need_tokens = kv_need_tokens(request)
        replicas = self._with_room(request, need_tokens)
        others = [each for each in replicas if each.id != attempt.replica.id]
        return self._book(request, others, need_tokens, now_s) if others else None

    def _book(
        self, request: Request, replicas: Sequence[Replica], need_tokens: int, now_s: float
    ) -> Dispatch:
        """Choose one of these engines and book an attempt there."""
        load = Load(self._queue.num_held(request.model) / len(replicas))
        replica = self.policy.choose(request, replicas, load, now_s)
        num_cached_tokens = replica.prefix_cache.num_tokens(request)
        num_new_tokens = max(1, request.num_prompt_tokens - num_cached_tokens)
        overhead_s = replica.request_overhead.usual_s
        predicted_ttft_s = replica.ttft_s(num_new_tokens, now_s, request.edf_key_s) + overhead_s
        predicted_tpot_s = replica.tpot_s(request.num_sequences)
        if (adapters := replica.adapters) is not None:
            answer_s = request.num_expected_output_tokens * predicted_tpot_s
            predicted_ttft_s += adapters.delay_s(request.model, answer_s)
            adapters.book(request.model)
        uses_prefix, num_used_tokens = False, 0
        if self.policy.wants_blocks:
            uses_prefix = request.num_prompt_tokens >= self._worth_tokens
            if uses_prefix:
                num_used_tokens = min(need_tokens, replica.prefix_cache.num_used_tokens(request))
                replica.prefix_cache.use_prompt(request)
            replica.prefix_cache.expect_prompt(request)
        may_bounce = self.holds and len(replicas) > 1
        max_pending_tokens = max_known_tokens(request, replica) if may_bounce else 0
        self._fleet.reuse.record_placed(request.model, request.num_prompt_tokens, num_cached_tokens)
        booking = replica.book(request, need_tokens, now_s, num_cached_tokens, num_used_tokens)
        is_probe = replica.breaker.status is _HALF_OPEN
        permit = replica.breaker.begin_call(now_s)
        self._fleet.refresh(replica)
        self._queue.charge_prompt(request)
        self._attempts.add(
            Attempt(
                request,
                replica,
                booking,
                now_s,
                predicted_ttft_s,
                predicted_tpot_s,
                permit,
                overhead_s,
                expects_prompt=self.policy.wants_blocks,
                uses_prefix=uses_prefix,
                is_alone=request.is_suspect,
                is_probe=is_probe,
            )
        )
        return Dispatch(request.id, replica.id, booking, num_cached_tokens, max_pending_tokens)

    def learn_prompt(
        self, request_id: str, replica_id: str, num_prompt_tokens: int, block_hashes: list[int]
    ) -> None:
        """Take in what an engine has made of a prompt, once; ignore an unknown attempt."""
        attempt = self._attempts.get(request_id, replica_id)
        if attempt is None or not attempt.expects_prompt:
            return
        attempt.expects_prompt = False
        request, replica = attempt.request, attempt.replica
        replica.prefix_cache.confirm_prompt(request)
        self.prompts.learn(request, num_prompt_tokens, block_hashes, replica.info.block_size)

    def learn_answer(self, attempt: Attempt, usage: Usage) -> None:
        """Take in that an engine has answered, and holds prompt and answer.

        If that is all that it has computed, and for one prompt.
        """
        request = attempt.request
        is_whole = request.num_sequences == 1 and not request.has_begun
        if usage.last_block and is_whole and self.policy.wants_blocks:
            num_tokens = usage.num_prompt_tokens + usage.num_output_tokens
            block_size = attempt.replica.info.block_size
            self.prompts.learn_answer(request, num_tokens, usage.last_block, block_size)

    @property
    def has_lapsing(self) -> bool:
        """Whether anything is reserved, for a held request or a suspect, that may lapse."""
        return len(self._reservations) > 0 or len(self._quarantine) > 0

    def place_held(self, now_s: float) -> list[Dispatch]:
        """Place what is held until nothing more is admissible, the most urgent first.

        Looks at the head of each model's queue and a few behind a blocked one, never at
        the whole queue.
        """
        dispatches: list[Dispatch] = []
        blocked: set[str] = set()
        self._reservations.drop_lapsed()
        if self._quarantine:
            self._quarantine.drop_lapsed()
        heads = self._queue.heads(blocked)
        while heads:
            head = heads.pop()
            dispatch = self.place(head, now_s)
            placed: list[Dispatch] = []
            if dispatch is not None:
                placed.append(dispatch)
                self._queue.remove(head.id)
                self._reservations.drop_lapsed()
            else:
                blocked.add(queue_name(head))
                # These wait for no room that others of their queue could take.
                if not (head.is_suspect or head.only_at):
                    placed = self._backfill(head, now_s)
            if placed:  # else all heads are as they were
                dispatches += placed
                heads = self._queue.heads(blocked)
        return dispatches

    def _backfill(self, head: Request, now_s: float) -> list[Dispatch]:
        """Reserve an engine for a blocked head. Place followers on the others."""
        if not self._any_accepts(head.model):
            return []  # no engine is given anything, so none needs to be reserved
        # Where the head waits behind the prefill of long prompts, short ones may pass it before
        # its deadline: they take room in steps that it could not have.
        lacks_kv = self._fleet.any_accepts(head.model, short=False) or (
            self._passes and self._fleet.any_accepts_as_short(self._with_blocks(head))
        )
        if lacks_kv or now_s >= self._queue.key(head)[0]:
            self._reservations.reserve(head)
        dispatches: list[Dispatch] = []
        reserved = self._reservations.reserved_for(head)
        roomiest = self._most_room(head.model, reserved)
        for request in self._followers(head, roomiest):
            if kv_need_tokens(request) > roomiest:
                continue
            dispatch = self.place(request, now_s)
            if dispatch is not None:
                dispatches.append(dispatch)
                self._queue.remove(request.id)
                roomiest = self._most_room(head.model, reserved)
        return dispatches

    def _followers(self, head: Request, roomiest: float) -> list[Request]:
        """Return who may go before a blocked head: the next few, and those with reservations.

        None of the next few if none of them needs as little as `roomiest`.
        """
        front = self._queue.front(head.model, 1 + _BACKFILL_DEPTH)
        followers: list[Request] = []
        if self._least_need(head.model, front) <= roomiest:
            followers = front[1 : 1 + _BACKFILL_DEPTH]
        if self._queue.num_tenants > 1:  # then the holder of a reservation may be far behind
            holders = self._reservations.holders(head.model)
            followers += [each for each in holders if each is not head and each not in followers]
        return followers

    def _least_need(self, model: str, front: list[Request]) -> float:
        """Return the least KV room that a follower at this front of a queue needs, tokens."""
        known = self._least_needs.get(model)
        if known is not None and known[0] is front:
            return known[1]
        least = math.inf
        for request in front[1 : 1 + _BACKFILL_DEPTH]:
            least = min(least, kv_need_tokens(request))
        self._least_needs[model] = (front, least)
        return least

    @property
    def _passes(self) -> bool:
        """Whether short prompts pass long ones; by arrival nobody passes anybody."""
        return not self._queue.by_arrival

    def _most_room(self, model: str, beside: str | None = None) -> float:
        """Return the most KV room of an engine that should get anything now, tokens; or -inf.

        Of any but the engine of the id `beside`.
        """
        return self._fleet.most_room(model, short=self._passes, beside=beside)

    def _any_accepts(self, model: str) -> bool:
        """Whether any engine of the model should get anything now, KV room aside."""
        return self._fleet.any_accepts(model, short=self._passes)

    def _with_room(self, request: Request, need_tokens: int) -> list[Replica]:
        """Return the engines that should get this request now and are not reserved for another.

        They have room for `need_tokens`, which it needs. The list is not to be changed.
        """
        replicas = self._fleet.with_room(request, need_tokens, short=self._passes)
        if not replicas or not self._reservations:
            return replicas
        return self._reservations.available_to(request, replicas)

    def _beside_holders(
        self, request: Request, replicas: list[Replica], need_tokens: int, now_s: float
    ) -> list[Replica]:
        """Return these engines, and those that hold so much of the prompt that it may wait there.

        An engine that has enough to prefill gets no more, because others may be sooner free. But
        where a prefix is worth steps, that engine is the sooner one, whatever it has to do first:
        to prefill a long context once more takes longer, and takes the room of others' contexts,
        which are then prefilled once more in turn. The policy compares the waits.

        What running requests hold of the prompt takes no more room. Where it is not enough yet,
        the request waits inside the engine, if that costs less than to begin anew elsewhere.
        """
        elsewhere_s = math.inf
        reused = self._fleet.reuse.share(request.model)
        holders: list[Replica] = []
        for replica in self._fleet.working(request.model):
            cache = replica.prefix_cache
            if request.block_hashes[0] not in cache or replica in replicas:
                continue
            num_cached = cache.num_tokens(request)
            if num_cached < self._worth_tokens:
                continue
            num_missing = need_tokens - cache.num_used_tokens(request) - replica.room_tokens
            if num_missing > 0.0:
                if not replicas:
                    continue
                if elsewhere_s == math.inf:
                    elsewhere_s = min(
                        [prefill_cost_s(request, each, reused, now_s) for each in replicas]
                    )
                wait_s = _kv_wait_s(request, replica, num_missing)
                if prefill_cost_s(request, replica, reused, now_s) + wait_s >= elsewhere_s:
                    continue
            holders.append(replica)
        if holders and self._reservations:
            holders = self._reservations.available_to(request, holders)
        return [*replicas, *holders] if holders else replicas

    def _beside_loaded(
        self, request: Request, replicas: list[Replica], need_tokens: int
    ) -> list[Replica]:
        """Return these engines, and those with KV room that have the request's adapter at hand.

        If these would all have to load it. It may be sooner to wait inside an engine that has
        enough to prefill than to load it elsewhere, where everybody waits: the policy compares.
        """
        for replica in replicas:
            if replica.adapters is None or not replica.adapters.load_s(request.model):
                return replicas
        loaded = [
            each
            for each in self._fleet.working(request.model)
            if each.room_tokens >= need_tokens
            and each.adapters is not None
            and each.adapters.has_at_hand(request.model)
        ]
        if loaded and self._reservations:
            loaded = self._reservations.available_to(request, loaded)
        return [*replicas, *loaded] if loaded else replicas

    def _meeting_tpot_target(self, request: Request, replicas: list[Replica]) -> list[Replica]:
        """Return those that can take the request at its model's TPOT target; all if none can."""
        target_s = request.tpot_target_s
        if target_s is None:
            targets_s = self._tpot_targets_s
            target_s = targets_s.get(request.model, targets_s.get("*", math.inf))
        return [each for each in replicas if meets_tpot_target(request, each, target_s)] or replicas

    def _with_blocks(self, request: Request) -> Request:
        """Return the request with the KV blocks of its prompt, as far as they are known."""
        if not request.prefix_hashes or not self.policy.wants_blocks:
            return request
        blocks, ends = self.prompts.find(request)
        if blocks == request.block_hashes:
            return request
        return msgspec.structs.replace(request, block_hashes=blocks, block_ends=ends)


def _kv_wait_s(request: Request, replica: Replica, num_missing: float) -> float:
    """Return about how long it takes until so many KV tokens more are free there, seconds.

    What requests there hold is held for as long as an answer like this one's takes (Little).
    """
    num_used = max(1, replica.info.num_kv_tokens - replica.snapshot.num_free_kv_tokens)
    answer_s = request.num_expected_output_tokens * replica.tpot_s(0)
    return num_missing * answer_s / num_used
