"""What are the states of several gateways together?

Counts are sums, by the repository's convention that their names begin with `num_`; what is true of
any gateway is true of all; mappings are united, key by key. What else a field is stands in
`_RULES`. A field without a rule is that of the first state, which is the gateway's that was asked:
its id, what it has learned, what is configured and so the same on all.
"""

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, TypeVar

import msgspec

from router import EngineSnapshot, RouterState
from router.estimators.accuracy import AccuracyState
from router.fleet.ledger import LedgerState
from router.fleet.prompt_blocks import PrefixMemoryState
from router.fleet.replica import ReplicaState
from router.providers.provider import KeyState, ProviderState
from router.queueing.held_classes import HeldClassState
from router.resilience.breaker import BreakerEvent, BreakerState, BreakerView
from router.resilience.retry_budget import RetryBudgetState
from router.resilience.suspects import SuspectsState
from router.scheduling.predictions import LengthsState
from serving.file_watch import FileWatchState
from serving.gateway.observe.state import GatewayState
from serving.gateway.tenants.tenants import TenantsState, TenantState

_State = TypeVar("_State", bound=msgspec.Struct)
_Rule = Callable[[Sequence[Any]], Any]


def merge(states: Sequence[_State]) -> _State:
    """Return states of one kind as one; the first is that of the gateway that was asked."""
    first = states[0]
    if len(states) == 1:
        return first
    if (rule := _STRUCT_RULES.get(type(first))) is not None:
        return rule(states)
    fields = {}
    for name in first.__struct_fields__:
        values = [value for each in states if (value := getattr(each, name)) is not msgspec.UNSET]
        rule = _RULES.get((_owner(type(first), name), name), _rule_of(name))
        fields[name] = rule(values) if values else msgspec.UNSET
    return type(first)(**fields)


def _owner(kind: type, name: str) -> type:
    """Return the class that has introduced a field."""
    return next(each for each in reversed(kind.__mro__) if name in each.__dict__)


def _rule_of(name: str) -> _Rule:
    return _sum if name.startswith("num_") else _united


def _sum(values: Sequence[Any]) -> Any:
    if isinstance(values[0], dict):
        return _by_key(values, _sum)
    return reduce(operator.add, values)


def _united(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, bool):
        return any(values)
    if isinstance(first, msgspec.Struct):
        return merge(values)
    if isinstance(first, dict):
        return _by_key(values, _united)
    return first


def merge_by_key(values: Sequence[dict[str, _State]]) -> dict[str, _State]:
    """Return mappings of states as one."""
    return _by_key(values, merge)


def _by_key(values: Sequence[dict], rule: _Rule) -> dict:
    keys = dict.fromkeys(key for each in values for key in each)
    return {key: rule([each[key] for each in values if key in each]) for key in keys}


def _first(values: Sequence[Any]) -> Any:
    return values[0]


def _most(values: Sequence[Any]) -> Any:
    return max(values)


def _least(values: Sequence[float | None]) -> float | None:
    return min((each for each in values if each is not None), default=None)


def _first_by_key(values: Sequence[dict]) -> dict:
    return _by_key(values, _first)


def _all_items(values: Sequence[list]) -> list:
    return sorted({item for each in values for item in each})


def _last_items(values: Sequence[list]) -> list:
    """Return the last items of each, together about as many as one has."""
    num_each = -(-max(len(each) for each in values) // len(values))
    return [item for each in values for item in each[-num_each:]] if num_each else []


def _last_events(values: Sequence[list[BreakerEvent]]) -> list[BreakerEvent]:
    return sorted(_last_items(values), key=lambda event: event.at_s)


def _most_compared(values: Sequence[AccuracyState]) -> AccuracyState:
    """Return the accuracy that is of most predictions: percentiles cannot be added."""
    return max(values, key=lambda each: each.num_compared)


def _broken(values: Sequence[FileWatchState]) -> FileWatchState:
    return next((each for each in values if each.error is not None), values[0])


_BY_OPENNESS = (BreakerState.CLOSED, BreakerState.HALF_OPEN, BreakerState.OPEN)


def _worst_breaker(values: Sequence[BreakerView]) -> BreakerView:
    worst = max(values, key=lambda each: _BY_OPENNESS.index(each.state))
    return msgspec.structs.replace(worst, num_open_calls=sum(v.num_open_calls for v in values))


def _one_engine(values: Sequence[ReplicaState]) -> ReplicaState:
    """Return what gateways know of one engine: its freshest snapshot, and all their bookings."""
    freshest = min(values, key=lambda each: (each.snapshot is None, each.age_s))
    ledger: LedgerState = merge([each.ledger for each in values])
    snapshot = freshest.snapshot or EngineSnapshot(seq=0)
    others_kv_tokens = ledger.num_kv_tokens - freshest.ledger.num_kv_tokens
    return msgspec.structs.replace(
        freshest,
        is_draining=any(each.is_draining for each in values),
        is_quarantined=any(each.is_quarantined for each in values),
        is_mute=any(each.is_mute for each in values),
        breaker=_worst_breaker([each.breaker for each in values]),
        ledger=ledger,
        num_pending_prefill_tokens=snapshot.num_pending_prefill_tokens + ledger.num_prefill_tokens,
        num_free_kv_tokens=freshest.num_free_kv_tokens - others_kv_tokens,
        num_cached_blocks=max(each.num_cached_blocks for each in values),
        ttft_s=max(each.ttft_s for each in values),
    )


_STRUCT_RULES: dict[type, _Rule] = {
    ReplicaState: _one_engine,
    BreakerView: _worst_breaker,
    AccuracyState: _most_compared,
    FileWatchState: _broken,
}
# By the class that has the field: what is neither a count nor the same on all.
_RULES: dict[tuple[type, str], _Rule] = {
    (RouterState, "outcomes"): _sum,
    (RouterState, "breaker_events"): _last_events,
    (GatewayState, "hardware"): _first_by_key,  # of the engine, whoever tells
    (GatewayState, "drained"): _all_items,
    (GatewayState, "scalers"): _first_by_key,  # all are told the same
    (HeldClassState, "oldest_s"): _most,
    (HeldClassState, "due_in_s"): _least,
    (LengthsState, "recent"): _last_items,
    (PrefixMemoryState, "max_blocks"): _sum,
    (PrefixMemoryState, "max_bytes"): _sum,
    (RetryBudgetState, "balance"): _sum,
    (SuspectsState, "num_suspects"): _most,  # the same bodies may have been on several
    (SuspectsState, "num_refused"): _most,
    (ProviderState, "ttft_s"): _most,
    (ProviderState, "cost"): _sum,
    (KeyState, "budget"): _first,  # kept in one place for all
    (TenantsState, "num_keys"): _first,  # of one file
    (TenantState, "remaining"): lambda values: _by_key(values, _sum),
}
