"""How much of each class waits, and is what it was promised still in reach?"""

from collections.abc import Iterable

import msgspec

from router.core.settings import RouterSettings
from router.queueing.deadline import ttft_deadline_s
from router.types import Request


class HeldClassState(msgspec.Struct, frozen=True, kw_only=True):
    """What is held of one class. The promise is the time to first token that it aims at."""

    num_requests: int
    num_tokens: int  # of their prompts
    num_late: int  # whose promise is broken already
    oldest_s: float  # since the first of them arrived
    due_in_s: float | None  # until the next promise that is not broken yet; None: all are


def held_classes(
    held: Iterable[Request], settings: RouterSettings, now_s: float
) -> dict[str, HeldClassState]:
    """Return what is held by class; a class of which nothing is held is not there."""
    by_class: dict[str, list[Request]] = {}
    for request in held:
        by_class.setdefault(request.priority_class.value, []).append(request)
    return {name: _state(found, settings, now_s) for name, found in sorted(by_class.items())}


def _state(held: list[Request], settings: RouterSettings, now_s: float) -> HeldClassState:
    left_s = [ttft_deadline_s(request, settings) - now_s for request in held]
    kept_s = [each for each in left_s if each >= 0.0]
    return HeldClassState(
        num_requests=len(held),
        num_tokens=sum([request.num_prompt_tokens for request in held]),
        num_late=len(held) - len(kept_s),
        oldest_s=now_s - min([request.arrival_s for request in held]),
        due_in_s=min(kept_s) if kept_s else None,
    )
