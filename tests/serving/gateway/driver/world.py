"""A driver with fakes on all sides and a clock that stands still: what it tells whom, in order."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from router import Usage
from serving.gateway.driver import Driver
from serving.gateway.exchange import Attempt, Exchange
from serving.gateway.intake.fields import ChatFields
from serving.stream.record import Entry, Recorder
from tests.support.builders import req

NOW_S, WALL_S = 50.0, 1000.0
USAGE = Usage(num_prompt_tokens=10, num_output_tokens=2)
HEADERS = [(b"content-type", b"text/event-stream")]


# Asked all the time, or told of every end: `test_journey.py`.
_UNTOLD = (
    "discipline.predicted_ttft_s",
    "metrics.observe_end",
    "providers.rearm_timer",
    "router.next_wake_s",
    "router.state",
)


class Fake:
    """Somebody to be told things: notes each call; answers as `replies` says, else with []."""

    def __init__(self, name: str, told: list[tuple], replies: dict[str, Any]) -> None:
        self.name, self.told, self.replies = name, told, replies

    def __getattr__(self, what: str) -> Callable[..., Any]:
        name = f"{self.name}.{what}"

        def call(*args: Any, **kwargs: Any) -> Any:
            reply = self.replies.get(name, [])
            if name not in _UNTOLD:
                self.told.append((name, *args, *([kwargs] if kwargs else [])))
            if isinstance(reply, Exception):
                raise reply
            return reply

        return call


class World:
    """A driver, whom it knows, and what they were told, in order."""

    def __init__(self, window_bytes: int = 100) -> None:
        self.told: list[tuple] = []
        self.replies: dict[str, Any] = {
            "router.next_wake_s": None,
            "router.state": SimpleNamespace(replicas={}, held=SimpleNamespace(num_requests=0)),
            "discipline.engine_priority_s": None,
            "discipline.predicted_ttft_s": 0.25,
        }
        router = self.fake("router")
        for part in ("providers", "failures", "discipline"):
            router.__dict__[part] = self.fake(f"router.{part}" if part != "discipline" else part)
        self.providers = self.fake("providers")
        self.providers.__dict__["make_limiter"] = "make_limiter"
        self.driver = Driver(
            router,
            self.providers,
            self.fake("metrics"),
            window_bytes=window_bytes,
            max_record_bytes=1000,
        )
        self.driver.engines = self.fake("engines")

    def fake(self, name: str) -> Any:
        return Fake(name, self.told, self.replies)

    def exchange(self, name: str = "a", **fields: Any) -> Exchange:
        request = req(name, arrival_s=NOW_S, **fields)
        args = (request, "POST", "/v1/chat/completions", [], b"{}", self.driver.records)
        return Exchange(*args, fields=ChatFields(), added={})

    def opened(self, name: str = "a", num_attempts: int = 0, **fields: Any) -> Exchange:
        """An exchange that is open, perhaps at engines r0 and r1; of that nothing is noted."""
        exchange = self.exchange(name, **fields)
        self.driver.open(exchange)
        for number in range(num_attempts):
            connection = SimpleNamespace(replica_id=f"r{number}")
            exchange.attempts.append(Attempt(exchange, connection, number + 1))
        self.told.clear()
        return exchange


def record(*token_ids: int) -> bytes:
    recorder = Recorder()
    recorder.add_entry(Entry(0, token_ids), is_streamed=True)
    recorder.end_group()
    return recorder.take_groups()


async def error_of(exchange: Exchange) -> Exception | None:
    """How an exchange has ended; None: well, and with nothing more to read."""
    try:
        while chunk := exchange.read():
            pass
        assert chunk == b""
    except Exception as error:
        return error
    return None
