"""How much work has come, how much waits, and what does a token cost? As one gateway knows it.

Of each model apart, by all of its names.

Prefill and decode are counted apart, for they cost differently: an engine computes a prompt's
tokens in a few steps, and each token of a reply in a step of its own. Totals only grow; who reads
them takes differences, so that a report that is lost, or comes twice, changes nothing.
"""

from collections.abc import Collection, Iterable

import msgspec

from router.fleet.replica import Replica
from router.types import Request, Usage

# How much of prompts is found in prefix caches is known to 1/16 after so many replies, and
# follows a change within some hundred.
_MEMORY_REPLIES = 256.0


class EngineRates(msgspec.Struct, frozen=True, kw_only=True):
    """What a step of one kind of engine costs, as measured, and what the engine can hold."""

    step_base_s: float  # of every step
    token_s: float  # per prefilled token
    decode_s: float  # per decoding sequence
    num_kv_tokens: int
    num_steps: int = 0  # that this was learned from; 0: a guess


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What one gateway has seen, or several together."""

    num_requests_total: int = 0
    num_prefill_tokens_total: float = 0.0  # of prompts, but for what caches are expected to hold
    num_decode_tokens_total: float = 0.0  # of replies, as predicted when the requests came
    num_held_requests: int = 0
    num_held_tokens: int = 0  # of their prompts
    num_open_requests: int = 0  # held ones included
    rates: EngineRates | None = None  # None: no engine has been seen yet
    left_tokens: dict[str, int] = {}  # what each engine still holds: to prefill and to decode


class _Counts:
    """What has come for one model, by the name that it was asked for."""

    __slots__ = ("cached_share", "num_decode_tokens", "num_prefill_tokens", "num_requests")

    def __init__(self) -> None:
        self.cached_share = 0.0  # of prompts
        self.num_requests = 0
        self.num_prefill_tokens = 0.0
        self.num_decode_tokens = 0.0


class DemandMeter:
    """Counts what comes, by model, and learns how much of prompts need not be computed."""

    __slots__ = ("_by_model",)

    def __init__(self) -> None:
        self._by_model: dict[str, _Counts] = {}

    def record_arrival(self, request: Request) -> None:
        """Count a request that has come, by its prompt and by the reply that is predicted."""
        counts = self._by_model.get(request.model)
        if counts is None:
            counts = self._by_model[request.model] = _Counts()
        counts.num_requests += 1
        counts.num_prefill_tokens += request.num_prompt_tokens * (1.0 - counts.cached_share)
        counts.num_decode_tokens += request.num_sequences * request.num_expected_output_tokens

    def record_usage(self, model: str, usage: Usage) -> None:
        """Learn from a reply how much of its prompt was cached."""
        counts = self._by_model.get(model)
        if counts is not None and usage.num_prompt_tokens > 0:
            share = min(1.0, usage.num_cached_tokens / usage.num_prompt_tokens)
            counts.cached_share += (share - counts.cached_share) / _MEMORY_REPLIES

    def report(
        self,
        replicas: Iterable[Replica],
        models: Collection[str] | None = None,
        *,
        num_held_requests: int,
        num_held_tokens: int,
    ) -> Demand:
        """Return the totals so far, and how engines and queue are now.

        `models` are the names of one, and what is held is of these, too; None: of all there are.
        """
        left: dict[str, int] = {}
        learned: list[Replica] = []
        num_placed = 0
        for replica in replicas:
            if models is None or not replica.names.isdisjoint(models):
                left[replica.id] = left_tokens(replica)
                num_placed += replica.ledger.num_open
                learned.append(replica)
        num_requests, num_prefill, num_decode = 0, 0.0, 0.0
        for name, counts in self._by_model.items():
            if models is None or name in models:
                num_requests += counts.num_requests
                num_prefill += counts.num_prefill_tokens
                num_decode += counts.num_decode_tokens
        return Demand(
            num_requests_total=num_requests,
            num_prefill_tokens_total=num_prefill,
            num_decode_tokens_total=num_decode,
            num_held_requests=num_held_requests,
            num_held_tokens=num_held_tokens,
            num_open_requests=num_held_requests + num_placed,
            rates=mean_rates(learned),
            left_tokens=left,
        )


def left_tokens(replica: Replica) -> int:
    """Return the tokens that an engine has yet to compute for what it holds, about."""
    ledger = replica.ledger
    # Of what runs, the KV tokens by which it may still grow are the tokens that are to come.
    num_used = replica.info.num_kv_tokens - replica.snapshot.num_free_kv_tokens
    num_to_come = max(0, ledger.num_acknowledged_own_kv_tokens - num_used)
    return replica.num_pending_prefill_tokens + num_to_come + replica.num_sequences


def mean_rates(replicas: list[Replica]) -> EngineRates | None:
    """Return the rates of the engines that have learned most, on average; None without engines.

    An engine that has run few steps says nothing beside one that has run many.
    """
    most = 0
    for replica in replicas:
        most = max(most, replica.predictor.num_steps)
    chosen = [each for each in replicas if 2 * each.predictor.num_steps >= most]
    if not chosen:
        return None
    num = len(chosen)
    base_s, token_s, decode_s, num_kv = 0.0, 0.0, 0.0, 0
    for replica in chosen:
        base_s += replica.predictor.step_base_s / num
        token_s += replica.predictor.token_s / num
        decode_s += replica.predictor.decode_s / num
        num_kv += replica.info.num_kv_tokens
    return EngineRates(
        step_base_s=base_s,
        token_s=token_s,
        decode_s=decode_s,
        num_kv_tokens=num_kv // num,
        num_steps=most,
    )


def total(reports: Iterable[Demand]) -> Demand:
    """Return what several gateways have seen together.

    Each knows of an engine what its snapshots say, which is everybody's, and of bookings its own:
    what an engine holds is the most that any of them knows of.
    """
    num_requests, num_held, num_held_tokens, num_open = 0, 0, 0, 0
    num_prefill, num_decode = 0.0, 0.0
    rates: EngineRates | None = None
    left: dict[str, int] = {}
    for report in reports:
        num_requests += report.num_requests_total
        num_prefill += report.num_prefill_tokens_total
        num_decode += report.num_decode_tokens_total
        num_held += report.num_held_requests
        num_held_tokens += report.num_held_tokens
        num_open += report.num_open_requests
        if report.rates is not None and (rates is None or report.rates.num_steps > rates.num_steps):
            rates = report.rates
        for engine, num_tokens in report.left_tokens.items():
            left[engine] = max(num_tokens, left.get(engine, 0))
    return Demand(
        num_requests_total=num_requests,
        num_prefill_tokens_total=num_prefill,
        num_decode_tokens_total=num_decode,
        num_held_requests=num_held,
        num_held_tokens=num_held_tokens,
        num_open_requests=num_open,
        rates=rates,
        left_tokens=left,
    )
