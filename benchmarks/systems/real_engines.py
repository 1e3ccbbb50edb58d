"""`headway serve` with real vLLM engines on CPU cores, its policy switched while it serves."""

import asyncio
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from benchmarks.systems.system import BenchmarkError, Headway
from router.simulation.variant import split

_IDLE_POLL_S = 0.25
_CACHED_TOKENS = "headway_cached_prompt_tokens_total"
_PROMPT_TOKENS = "headway_prompt_tokens_total"


class RealEngines(Headway):
    """The bundled model on `num_engines` engines, behind the gateway's own listener."""

    # A machine's first start downloads the model and converts it.
    start_timeout_s = 900.0

    def __init__(self, num_engines: int) -> None:
        super().__init__("own", num_engines)

    def config(self, port: int, gateway_port: int) -> dict[str, Any]:
        """Return the content of the config file: the stand-in's, without the stand-in."""
        config = super().config(port, gateway_port)
        args = config["applications"][0]["args"]
        del args["engine"], args["served_model_name"]
        return config

    async def model(self) -> str:
        """Return the name of the model that is served."""
        reply = json.loads(await asyncio.to_thread(self._ask, "/v1/models"))
        return reply["data"][0]["id"]

    async def state(self) -> dict[str, Any]:
        """Return `/headway/state`."""
        return json.loads(await asyncio.to_thread(self._ask, "/headway/state"))

    async def switch(self, policy: str) -> None:
        """Choose by `policy` from now on; `headway:hold,order` is headway without these two."""
        name, parts = split(policy)
        body: dict[str, Any] = {"policy": name, "ablate": parts}
        await asyncio.to_thread(self._ask, "/headway/policy", json.dumps(body).encode())

    async def prompt_tokens(self) -> tuple[float, float]:
        """Return the prompt tokens served so far, and those of them found in a prefix cache."""
        text = await asyncio.to_thread(self._ask, "/metrics")
        return total(text, _PROMPT_TOKENS), total(text, _CACHED_TOKENS)

    async def wait_until_idle(self, timeout_s: float = 120.0) -> None:
        """Return when neither the gateway nor an engine has a request any more."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            num_open = (await self.state())["num_open_requests"]
            if not num_open and not await asyncio.to_thread(self.num_streams_in_engines):
                return
            if time.monotonic() > deadline_s:
                raise BenchmarkError(f"still {num_open} requests open after {timeout_s:g} s")
            await asyncio.sleep(_IDLE_POLL_S)

    def _ask(self, path: str, body: bytes | None = None) -> str:
        try:
            with urllib.request.urlopen(self.urls[0] + path, body, timeout=30) as reply:
                return reply.read().decode()
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")
            raise BenchmarkError(f"{path}: HTTP {error.code}: {reason}") from None
        except OSError as error:
            log = self.launches[0].log_tail()
            raise BenchmarkError(f"{path} does not answer ({error}):\n{log}") from None


@dataclass
class HoldWatch:
    """Looks at the hold queue twice a second while a run goes on."""

    subject: RealEngines
    num_held: list[int] = field(default_factory=list)

    async def look(self) -> None:
        """Look until cancelled."""
        while True:
            self.num_held.append((await self.subject.state())["held"]["num_requests"])
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
