"""Ids and dates in a response that follow from its request, in whichever engine (vLLM 0.32)."""

import hashlib
import sys
import time
from typing import Any

import vllm.utils

from serving.stream.accounting import current_accounting

_API_MODULES = tuple(
    f"vllm.entrypoints.openai.{name}"
    for name in (
        "chat_completion.protocol",
        "chat_completion.serving",
        "completion.protocol",
        "completion.serving",
    )
)
# Names requests inside the engine, where nobody sees it. A request that comes back to an
# engine needs another name there: vLLM's core may act on the abort of the first one when
# the second has begun (`EngineCore.aborts_queue` keeps no order with new requests).
_UNIQUE = frozenset(("vllm.v1.engine.input_processor",))


class _RequestTime:
    """The module `time` as the API layer sees it: a request is as old as its gateway says."""

    def time(self) -> float:
        accounting = current_accounting.get()
        return float(accounting.created_s) if accounting and accounting.created_s else time.time()

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def make_repeatable() -> None:
    """Have vLLM's API layer in this process write such ids and dates."""
    random_uuid = vllm.utils.random_uuid

    def repeatable_uuid() -> str:
        accounting = current_accounting.get()
        if accounting is None or not accounting.request_id:
            return random_uuid()
        accounting.num_ids += 1
        text = f"{accounting.request_id} {accounting.created_s} {accounting.num_ids}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    vllm.utils.random_uuid = repeatable_uuid
    for name, module in list(sys.modules.items()):
        if (
            name.startswith("vllm.")
            and name not in _UNIQUE
            and getattr(module, "random_uuid", None) is random_uuid
        ):
            module.random_uuid = repeatable_uuid  # type: ignore[attr-defined]
    for name in _API_MODULES:
        sys.modules[name].time = _RequestTime()  # type: ignore[attr-defined]
