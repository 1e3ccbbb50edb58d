"""Least cost in seconds: the default."""

import math
import random
import zlib
from collections.abc import Collection, Sequence
from typing import ClassVar

from router.fleet.replica import Replica
from router.scheduling.policies.base import Load, Policy
from router.types import Request

# Costs within 5 % count as equal. That is a quarter of the error that predictions have at
# best, so a smaller difference is noise. Following noise would send everything to the same
# one of several idle engines.
_TIE = 1.05

# Predictions are off by 15 % in the median (bench-real), hence by a standard deviation of
# 0.22, and the ratio of two of them by 0.31. A prefix that another engine holds is prefilled
# once more only where the gain is surer than that, 5 to 1.
_CACHED_TIE = 1.3

# The best of 64 at random is among the best 7 % of all with probability
# 1 - 0.93^64 = 0.99, so comparing thousands would gain next to nothing.
_MAX_COMPARED = 64


class Headway(Policy):
    """The replica where the request costs the least waiting, summed over all who wait.

    The cost is one number without weights: seconds, by rates that were learned from the
    engines (docs/routing.md). It counts the delay of others, too, because that makes the
    sum over all requests small and not just each one's own wait (marginal cost pricing,
    Pigou 1920). A prefix that an engine holds makes the request cheap there. When that
    engine is busy, another becomes cheaper, prefills the prefix anew and holds it, too,
    from then on. So hot prefixes spread and conversations stay, without a threshold. So do LoRA
    adapters: what loading one takes is seconds like any others.

    Without the part `congestion_cost` only the request's own wait counts; without `prefix`
    no prompt is known to be cached.
    """

    name: ClassVar[str] = "headway"
    holds: ClassVar[bool] = True

    def __init__(self, rng: random.Random, ablated: Collection[str] = ()) -> None:
        super().__init__(rng, ablated)
        self._counts_others = "congestion_cost" not in self.ablated
        self._costs_s = costs_s if self._counts_others else own_costs_s
        self.wants_prefix = self.wants_blocks = "prefix" not in self.ablated

    def choose(
        self, request: Request, replicas: Sequence[Replica], load: Load, now_s: float
    ) -> Replica:
        """Return a replica of the lowest cost, a random one among equals."""
        if len(replicas) == 1:
            return replicas[0]
        # A list it is in fact, and compiled code is faster where it knows that.
        candidates = replicas if isinstance(replicas, list) else list(replicas)
        if len(candidates) > _MAX_COMPARED:
            candidates = self._draw_candidates(request, candidates)
        return self._choose_among(request, candidates, load, now_s)

    def _choose_among(
        self, request: Request, replicas: list[Replica], load: Load, now_s: float
    ) -> Replica:
        """Return a replica of the lowest cost of these, all of which are compared."""
        num_new = num_new_tokens(request, replicas)
        costs = self._costs_s(request, replicas, num_new, load, now_s)
        if request.model != replicas[0].info.model:  # an alias, or an adapter
            costs = adapter_costs_s(request, replicas, costs, counts_others=self._counts_others)
        lowest_s = min(costs)
        limit_s = lowest_s * _TIE
        equals = [replicas[index] for index, cost in enumerate(costs) if cost <= limit_s]
        if request.block_hashes:
            limit_s = lowest_s * _CACHED_TIE
            nearly = [index for index, cost in enumerate(costs) if cost <= limit_s]
            fewest = min([num_new[index] for index in nearly])
            if fewest < request.num_prompt_tokens:  # some of it is cached there
                equals = [replicas[index] for index in nearly if num_new[index] == fewest]
        # Replicas come in the order in which they began to accept work. A simulation that skips
        # snapshots nobody asks for sees another one, so ids decide.
        ids = [replica.id for replica in equals]
        if request.session and not request.block_hashes:
            # What its last turn left in a cache, another gateway may know that placed it: all
            # gateways draw alike for a session (rendezvous hashing, Thaler and Ravishankar 1998).
            ranks = [zlib.crc32(each.encode(), request.session) for each in ids]
            return equals[ranks.index(max(ranks))]
        drawn_id = sorted(ids)[int(self.rng.random() * len(ids))]
        return equals[ids.index(drawn_id)]

    def _draw_candidates(self, request: Request, replicas: list[Replica]) -> list[Replica]:
        """Return a random part of a large fleet, and those that hold the prompt's beginning.

        Each at most `_MAX_COMPARED`.
        """
        start = int(self.rng.random() * len(replicas))
        drawn = replicas[start : start + _MAX_COMPARED]
        if len(drawn) < _MAX_COMPARED:
            drawn = [*drawn, *replicas[: _MAX_COMPARED - len(drawn)]]
        if not request.block_hashes:
            return drawn
        first: object = request.block_hashes[0]
        # Holders among the drawn ones are the first of all holders.
        others = [replica for replica in drawn if first not in replica.prefix_cache]
        return [*_first_holders(first, replicas, start), *others]


def _first_holders(block: object, replicas: list[Replica], start: int) -> list[Replica]:
    """Return the first replicas from index `start` on, and round, whose cache holds a block.

    At most `_MAX_COMPARED`.
    """
    holders: list[Replica] = []
    index = start
    for _ in range(len(replicas)):
        replica = replicas[index]
        if block in replica.prefix_cache:
            holders.append(replica)
            if len(holders) == _MAX_COMPARED:
                break
        index += 1
        if index == len(replicas):
            index = 0
    return holders


def num_new_tokens(request: Request, replicas: list[Replica]) -> list[int]:
    """Return the prompt tokens that each replica would have to prefill: `Replica.num_new_tokens`.

    For all at once, so that the request is read once.
    """
    blocks, ends, texts = request.block_hashes, request.block_ends, request.prefix_hashes
    text_share, num_tokens = request.prefix_block_share, request.num_prompt_tokens
    num_new = []
    for replica in replicas:
        cache = replica.prefix_cache
        num_cached = 0  # the usual case
        if blocks or cache.coming:
            num_cached = cache.num_tokens_of(blocks, ends, texts, text_share, num_tokens)
        num_new.append(max(1, num_tokens - num_cached))
    return num_new


def prefill_cost_s(request: Request, replica: Replica, reused_share: float, now_s: float) -> float:
    """Return how long a request waits for its first token there, and others for its prefill.

    In seconds, KV room aside. What decodes there waits for its prefill. And what that takes the
    cache's room of is asked for again, as often as prompts find their tokens cached
    (`reused_share`), and is prefilled again in its turn. So it tells what a prefix is worth that
    another engine would have to prefill once more.
    """
    num_tokens = replica.num_new_tokens(request)
    num_delayed = replica.num_decoding + reused_share * (1 + replica.num_decoding)
    own_s = replica.ttft_s(num_tokens, now_s, request.edf_key_s)
    return own_s + num_tokens * replica.token_s * num_delayed


def costs_s(
    request: Request,
    replicas: list[Replica],
    num_new: list[int],
    load: Load,
    now_s: float,
) -> list[float]:
    """Return how long the request waits for its first token, and others for it, per replica.

    In seconds. Its own wait is the time to its first token there. It delays others in four ways:

    - While it decodes, it makes each step of every other sequence there longer. Those still in
      prefill will be decoding by then, so they count, too. This lasts until later arrivals have
      evened it out by going elsewhere. Engines with n sequences each differ by some √n of them
      (Poisson). Of n sequences with answers of L tokens, n / L end per step and are replaced
      (Little). So it lasts for L / √n steps. How much one more sequence adds to a step is a
      slope. Where all engines run about as many sequences, slopes are learned poorly and differ
      mostly by noise, which would send everybody to the same engine. Hence one share of a step
      is computed for all engines together; how long a step takes is each engine's own.
    - Held requests that would have gone there wait for its prefill: `load.num_held_per_engine`.
    - So do the prompts there that it passes.
    - What decodes there waits for what would be cached elsewhere, and need not be done at all.

    That its prefill delays what decodes there is left out but for that: it delays as many wherever
    and whenever it is done. Counting it would send a burst to the engine that decodes least, where
    the burst waits for itself and delays those few for long.

    What others are delayed by everywhere alike is left out, too. It decides nothing, and where
    answers are long it is far more than any wait for a first token, of which costs that count as
    equal would then hide all.
    """
    base_s, decode_s, num_sequences = 1e-9, 0.0, 0  # a step takes some time
    for replica in replicas:
        base_s += replica.step_base_s
        decode_s += replica.decode_s
        num_sequences += replica.num_sequences
    num_outputs = request.num_sequences * request.num_expected_output_tokens
    num_steps = num_outputs / math.sqrt(max(1.0, num_sequences / len(replicas)))
    factor_s = num_steps * decode_s  # out of the loop, which runs for every engine
    num_held, edf_key_s = load.num_held_per_engine, request.edf_key_s
    fewest = min(num_new)
    own_s: list[float] = []
    all_others_s: list[float] = []
    for index, replica in enumerate(replicas):
        num_tokens = num_new[index]
        slowness = replica.chunk_overhead_s / (base_s + decode_s * replica.num_decoding)
        others_s = factor_s * slowness * replica.num_sequences
        others_s += num_tokens * replica.token_s * num_held
        others_s += (num_tokens - fewest) * replica.token_s * replica.num_decoding
        others_s += replica.passing_s(num_tokens, edf_key_s)
        own_s.append(replica.ttft_s(num_tokens, now_s, edf_key_s))
        all_others_s.append(others_s)
    alike_s = min(all_others_s)
    return [own_s[index] + others_s - alike_s for index, others_s in enumerate(all_others_s)]


def adapter_costs_s(
    request: Request, replicas: list[Replica], costs: list[float], *, counts_others: bool
) -> list[float]:
    """Return these costs with what the request's LoRA adapter adds to each, seconds.

    Where it is not at hand it is loaded, which all there wait for, and the adapter that makes room
    is to be loaded again. Where as many others are in use as can be, it waits for one of them.
    An engine that has it is taken before others that seem less than `_CACHED_TIE` better: for them
    the cost is then inf.
    """
    name = request.model
    total_s: list[float] = []
    at_hand: list[int] = []
    for index, replica in enumerate(replicas):
        cost_s, adapters = costs[index], replica.adapters
        if adapters is not None and name in adapters.paths:
            answer_s = request.num_expected_output_tokens * replica.tpot_s(1)
            cost_s += adapters.delay_s(name, answer_s)
            if counts_others and (load_s := adapters.load_s(name)) > 0.0:
                cost_s += load_s * (replica.num_sequences + adapters.evicts(name))
            if adapters.has_at_hand(name):
                at_hand.append(index)
        total_s.append(cost_s)
    if at_hand and len(at_hand) < len(replicas):
        limit_s = min(total_s) * _CACHED_TIE
        if min([total_s[index] for index in at_hand]) <= limit_s:
            return [
                cost_s if index in at_hand else math.inf for index, cost_s in enumerate(total_s)
            ]
    return total_s


def own_costs_s(
    request: Request,
    replicas: list[Replica],
    num_new: list[int],
    load: Load,
    now_s: float,
) -> list[float]:
    """Return how long the request itself waits for its first token, per replica, seconds."""
    edf_key_s = request.edf_key_s
    return [
        replica.ttft_s(num_new[index], now_s, edf_key_s) for index, replica in enumerate(replicas)
    ]
