"""Least cost in seconds: the default."""

import math
import random
from collections.abc import Collection, Sequence
from operator import attrgetter
from typing import ClassVar

from router.fleet.replica import Replica
from router.scheduling.policies.base import Policy
from router.types import Request

# Costs within 5 % count as equal: a quarter of the error that predictions have
# at best, so a difference below it is noise, and following noise would send
# everything to the same one of several idle engines.
_TIE = 1.05

# Predictions are off by 15 % in the median (bench-real), so by a standard deviation of 0.22, and
# the ratio of two of them by 0.31. What another engine holds already is prefilled once more
# only where the gain is surer than that, 5 to 1.
_CACHED_TIE = 1.3

# The best of 64 at random is among the best 7 % of all with probability
# 1 - 0.93^64 = 0.99, so looking at thousands would gain next to nothing.
_MAX_COMPARED = 64


_id = attrgetter("id")


class Headway(Policy):
    """The replica where the request costs the least waiting, summed over all who wait.

    One number instead of weights: everything is in seconds, by rates that were
    learned from the engines (DESIGN.md, idea 2). Counting the delay of others
    is what makes the sum over all requests small and not just each one's own
    (marginal cost pricing, Pigou 1920). A prefix that an engine holds makes it
    cheap there; when that engine is busy another becomes cheaper, prefills the
    prefix anew and holds it, too, from then on: so hot prefixes spread and
    conversations stay, without a threshold. Without the part `congestion_cost`,
    each one's own waiting is all that counts; without `prefix`, nothing is known
    to be cached.
    """

    holds: ClassVar[bool] = True

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.ablate(())

    def ablate(self, parts: Collection[str]) -> None:
        """Choose without these parts; it has `congestion_cost` and `prefix`."""
        super().ablate(parts)
        self._costs_s = own_costs_s if "congestion_cost" in parts else costs_s
        self.wants_prefix = self.wants_blocks = "prefix" not in parts

    def choose(self, request: Request, replicas: Sequence[Replica], now_s: float) -> Replica:
        """Return a replica of the lowest cost, a random one among equals."""
        if len(replicas) == 1:
            return replicas[0]
        if len(replicas) > _MAX_COMPARED:
            replicas = self._some(request, replicas)
        costs = self._costs_s(request, replicas, now_s, self.num_held_per_engine)
        equals = _within(_TIE, costs, replicas)
        if request.block_hashes:
            nearly = _within(_CACHED_TIE, costs, replicas)
            cached = [replica.prefix_cache.num_tokens(request) for replica in nearly]
            if (most := max(cached)) > 0:
                equals = [
                    replica for replica, num in zip(nearly, cached, strict=True) if num == most
                ]
        if len(equals) > 1:
            # In an order of its own: theirs is that in which they opened, of which a
            # simulation that leaves out what nobody asks for knows another.
            equals.sort(key=_id)
        return equals[int(self.rng.random() * len(equals))]

    def _some(self, request: Request, replicas: Sequence[Replica]) -> Sequence[Replica]:
        """As many of a large fleet as are worth a look, at random, and who knows the prompt."""
        start = int(self.rng.random() * len(replicas))
        turned = [*replicas[start:], *replicas[:start]]
        some = turned[:_MAX_COMPARED]
        if not request.block_hashes:
            return some
        first = request.block_hashes[0]
        homes = [replica for replica in turned if first in replica.prefix_cache][:_MAX_COMPARED]
        return list(dict.fromkeys([*homes, *some]))


def _within(factor: float, costs: list[float], replicas: Sequence[Replica]) -> list[Replica]:
    """The replicas whose cost is at most so many times the lowest."""
    limit = min(costs) * factor
    return [replica for replica, cost in zip(replicas, costs, strict=True) if cost <= limit]


def costs_s(
    request: Request, replicas: Sequence[Replica], now_s: float, num_held: float
) -> list[float]:
    """Seconds waited by the request for its first token, and by others for it, per replica.

    While it decodes, each step of every other sequence there takes longer by what one
    more adds to it; those still in prefill will be decoding by then. That lasts until
    later arrivals, which go elsewhere for it, have made up for it: engines with n sequences
    each differ by some √n of them (Poisson), and of n with answers of L tokens, n / L end
    per step and are replaced (Little), so for L / √n steps. How much one more adds is a
    slope, and where all engines run about as many sequences, a slope is learned poorly:
    differences between theirs are mostly noise, which would draw everybody to the same
    engine. So they count together, as the share of a step that a sequence takes; how
    long its steps are is each engine's own.

    Whatever is held and would have gone there waits for its prefill: `num_held` of them,
    held requests per engine. So do the long prompts there that it passes. That its prefill
    also delays what decodes there is left out: it delays as many wherever and whenever it
    is done. Counting it sends a burst to the engine that decodes least, where the burst waits
    for itself and delays those few for long.
    """
    base_s, decode_s, num_sequences = 1e-9, 0.0, 0  # a step takes some time
    for replica in replicas:
        base_s += replica.step_base_s
        decode_s += replica.decode_s
        num_sequences += replica.num_sequences
    num_outputs = request.num_sequences * request.num_expected_output_tokens
    num_steps = num_outputs / math.sqrt(max(1.0, num_sequences / len(replicas)))
    factor_s = num_steps * decode_s  # read for every engine, hence what can be is done before
    costs = []
    for replica in replicas:
        num_new_tokens = replica.num_new_tokens(request)
        slowness = replica.chunk_overhead_s / (base_s + decode_s * replica.num_decoding)
        others_s = factor_s * slowness * replica.num_sequences
        others_s += num_new_tokens * replica.token_s * num_held
        if replica.long_edf_keys_s:
            others_s += replica.passing_s(num_new_tokens, request.edf_key_s)
        costs.append(replica.ttft_s(num_new_tokens, now_s, request.edf_key_s) + others_s)
    return costs


def own_costs_s(
    request: Request, replicas: Sequence[Replica], now_s: float, num_held: float
) -> list[float]:
    """Seconds waited by the request alone for its first token, per replica."""
    edf_key_s = request.edf_key_s
    return [
        replica.ttft_s(replica.num_new_tokens(request), now_s, edf_key_s) for replica in replicas
    ]
