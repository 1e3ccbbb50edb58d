"""How do the ids and the date of a response follow from its request, in whichever engine?

`serving.engine.vllm.patches` puts what is here in vLLM's place.
"""

import hashlib
import time
import uuid
from collections.abc import Callable
from typing import Any

from serving.stream.accounting import current_accounting

# Their responses say when they were created.
DATED_MODULES = tuple(
    f"vllm.entrypoints.openai.{name}"
    for name in (
        "chat_completion.protocol",
        "chat_completion.serving",
        "completion.protocol",
        "completion.serving",
        "responses.protocol",
        "responses.serving",
    )
)
# Draws the signatures of its thinking blocks from the module `uuid`.
SIGNING_MODULE = "vllm.entrypoints.anthropic.serving"
# Names requests inside the engine, where nobody sees it. A request that comes back to an
# engine needs another name there: vLLM's core may act on the abort of the first one when
# the second has begun (`EngineCore.aborts_queue` keeps no order with new requests).
INTERNAL_IDS = "vllm.v1.engine.input_processor"


class RequestTime:
    """The module `time` for vLLM's API layer: while it serves a request, the gateway's date."""

    def time(self) -> float:
        """Return when the gateway received the request, seconds since the epoch."""
        accounting = current_accounting.get()
        return float(accounting.created_s) if accounting and accounting.created_s else time.time()

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def stable_uuid(random_uuid: Callable[[], str]) -> Callable[[], str]:
    """Return a function that derives ids from the request; outside of one they stay random."""

    def id_of_request() -> str:
        accounting = current_accounting.get()
        if accounting is None or not accounting.request_id:
            return random_uuid()
        accounting.num_ids += 1
        text = f"{accounting.request_id} {accounting.created_s} {accounting.num_ids}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    return id_of_request


class RequestUuids:
    """The module `uuid` for vLLM's Messages API: what it draws for a request follows from it."""

    def uuid4(self) -> uuid.UUID:
        """Return an id that follows from the request; a random one outside of one."""
        halves = [stable_uuid(lambda: uuid.uuid4().hex[:16])() for _ in range(2)]
        return uuid.UUID("".join(halves))

    def __getattr__(self, name: str) -> Any:
        return getattr(uuid, name)
