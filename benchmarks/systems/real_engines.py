"""`headway serve` with real vLLM engines on CPU cores, its policy switched while it serves."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serving.capacity.service import Service

_CACHED_TOKENS = "headway_cached_prompt_tokens_total"
_PROMPT_TOKENS = "headway_prompt_tokens_total"


class RealEngines(Service):
    """The bundled model on `num_engines` engines, behind the gateway's own listener."""

    def __init__(self, num_engines: int, args: Mapping[str, Any] | None = None) -> None:
        """`args`: keys of the configuration, if any."""
        super().__init__(num_engines, {"device": "cpu", **(args or {})})

    async def model(self) -> str:
        """Return the name of the model that is served."""
        return json.loads(await self.ask("/v1/models"))["data"][0]["id"]

    async def prompt_tokens(self) -> tuple[float, float]:
        """Return the prompt tokens served so far, and those of them found in a prefix cache."""
        text = await self.ask("/metrics")
        return total(text, _PROMPT_TOKENS), total(text, _CACHED_TOKENS)


@dataclass
class HoldWatch:
    """Looks at the hold queue twice a second while a run goes on."""

    subject: Service
    num_held: list[int] = field(default_factory=list)

    async def look(self) -> None:
        """Look until cancelled."""
        while True:
            self.num_held.append((await self.subject.state()).held.num_requests)
            await asyncio.sleep(0.5)

    def mean_hold_s(self, span_s: float, num_requests: int) -> float:
        """Return the mean time in the queue by Little's law (mean number over arrival rate)."""
        if not self.num_held or not num_requests:
            return 0.0
        return sum(self.num_held) / len(self.num_held) * span_s / num_requests


def total(text: str, name: str) -> float:
    """Return the sum of a counter over all its labels, from Prometheus's text format."""
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith((f"{name} ", f"{name}{{"))
    )
