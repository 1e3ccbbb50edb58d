"""What does `headway serve` with real engines do? vLLM on CPU cores, behind our own gateway."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from serving.capacity.service import Service

_CACHED_TOKENS = "headway_cached_prompt_tokens_total"
_PROMPT_TOKENS = "headway_prompt_tokens_total"
_POLL_S = 0.5


class RealEngines(Service):
    """The bundled model on `num_engines` engines, behind the gateway's own listener."""

    def __init__(self, num_engines: int, args: Mapping[str, Any] | None = None) -> None:
        """`args`: keys of the configuration, if any."""
        super().__init__(num_engines, {"device": "cpu", **(args or {})})

    async def model(self) -> str:
        """Return the name of the served model."""
        return json.loads(await self.ask("/v1/models"))["data"][0]["id"]

    async def prompt_tokens(self) -> tuple[float, float]:
        """Return the prompt tokens served so far, and how many of them were in a prefix cache."""
        text = await self.ask("/metrics")
        return metric_total(text, _PROMPT_TOKENS), metric_total(text, _CACHED_TOKENS)


@dataclass
class HoldQueueMonitor:
    """The length of the hold queue, read twice a second."""

    service: Service
    num_held: list[int] = field(default_factory=list)

    async def poll(self) -> None:
        """Read the length until cancelled."""
        while True:
            self.num_held.append((await self.service.state()).held.num_requests)
            await asyncio.sleep(_POLL_S)

    def mean_hold_s(self, span_s: float, num_requests: int) -> float:
        """Return the mean time in the queue by Little's law (mean number over arrival rate)."""
        if not self.num_held or not num_requests:
            return 0.0
        return sum(self.num_held) / len(self.num_held) * span_s / num_requests


def metric_total(text: str, name: str) -> float:
    """Return the sum of one metric over all its labels, from Prometheus's text format."""
    families = text_string_to_metric_families(text)
    return sum(
        sample.value for family in families for sample in family.samples if sample.name == name
    )
