"""A provider dies under load, and gets all of it again when it is back."""

import asyncio
import contextlib
import re
import time

from router.resilience.breaker import BreakerState
from tests.support import virtual_time
from tests.support.provider_server import NUMBERS, ProviderServer, breaker, configured, listening
from tests.support.running_gateway import CHAT, running


def test_the_primary_dies_under_load_and_comes_back():
    """Moved requests: first token within 1.5 times the secondary's own, no error seen.

    In virtual time, or a busy machine would be judged.
    """
    virtual_time.run(_die_and_come_back())


async def _die_and_come_back() -> None:
    ttft_s = 0.4
    secondary = ProviderServer(name="second", ttft_s=ttft_s, token_s=0.002, words=NUMBERS)
    primary = ProviderServer(name="first", ttft_s=0.05, token_s=0.02, words=NUMBERS)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(listening(secondary))
        life = contextlib.AsyncExitStack()
        port = await life.enter_async_context(listening(primary))
        system = await stack.enter_async_context(
            running(num_engines=0, **configured(primary, secondary, continues=True))
        )
        times: dict[str, list[float]] = {"p0": [], "p1": []}
        errors = []

        async def ask() -> None:
            start_s = time.monotonic()
            async with system.client.stream("POST", CHAT, json=system.chat(max_tokens=3)) as reply:
                first_s, text = None, ""
                async for piece in reply.aiter_text():
                    first_s = first_s or time.monotonic() - start_s
                    text += piece
            words = re.findall(r'"content": ?"(\d)', text)
            if reply.status_code != 200 or words != list("012") or "[DONE]" not in text:
                errors.append(text)
            else:
                times[reply.headers["x-headway-provider"]].append(first_s)

        async def load(duration_s: float) -> None:
            end_s = time.monotonic() + duration_s
            tasks = []
            while time.monotonic() < end_s:
                tasks.append(asyncio.create_task(ask()))
                await asyncio.sleep(0.01)
            await asyncio.gather(*tasks)

        await load(0.5)
        assert not times["p1"]
        async with asyncio.TaskGroup() as group:
            group.create_task(load(1.5))
            await asyncio.sleep(0.5)
            num_begun = primary.num_begun
            primary.cut()
            await life.aclose()
        assert not errors
        # Those that had begun went on there, word for word.
        assert 0 < system.gateway.state().retries.num_made <= num_begun
        moved = times["p1"]
        print(f"{len(moved)} moved, first token after {max(moved):.3f} s at most")
        assert len(moved) > 50
        assert sorted(moved)[int(0.99 * len(moved))] <= 1.5 * ttft_s
        assert breaker(system).state is not BreakerState.CLOSED
        await asyncio.sleep((breaker(system).next_probe_in_s or 0.0) + 0.1)
        await stack.enter_async_context(listening(primary, port))
        primary.bodies.clear()
        times["p0"].clear()
        await ask()  # the probe
        assert len(primary.bodies) == 1
        await load(0.3)
        assert not errors
        assert len(times["p0"]) > 20  # all of the traffic
        assert len(primary.bodies) == len(times["p0"])
