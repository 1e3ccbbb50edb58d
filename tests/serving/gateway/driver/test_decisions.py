"""What the driver tells of clients, and how it does what is decided."""

import asyncio
import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from router import (
    Dispatch,
    Evacuate,
    Fail,
    Fallback,
    Hold,
    Reject,
    RejectReason,
    Withdraw,
)
from router.resilience.resume import Resume
from serving.gateway.exchange import ClientLeft, EngineFailed, Rejected
from tests.serving.gateway.driver.world import NOW_S, USAGE, World, error_of, record


class TestClients:
    async def test_a_request_arrives(self, world):
        exchange = world.exchange()
        world.driver.open(exchange)
        assert world.told == [("router.on_arrival", exchange.request, NOW_S)]
        assert world.driver.exchanges == {"a": exchange}
        assert exchange.is_open

    async def test_what_fails_at_arrival_leaves_nothing(self, world):
        exchange, error = world.exchange(), RuntimeError("ours")
        world.replies["router.on_arrival"] = error
        with pytest.raises(RuntimeError, match="ours"):
            world.driver.open(exchange)
        assert world.told[1:] == [
            ("providers.cancel_call", exchange),
            ("router.on_cancel", "a", NOW_S),
        ]
        assert not world.driver.exchanges
        assert await error_of(exchange) is error

    async def test_a_client_leaves(self, world):
        exchange = world.opened(num_attempts=1)
        exchange.usage = USAGE
        [attempt] = exchange.attempts
        world.driver.cancel(exchange)
        assert world.told == [
            ("providers.cancel_call", exchange),
            ("engines.cancel", attempt),
            ("router.on_cancel", "a", NOW_S, USAGE),
        ]
        error = await error_of(exchange)
        assert isinstance(error, ClientLeft)
        assert str(error) == "the client left"
        world.told.clear()
        world.driver.cancel(exchange)  # again
        assert not world.told

    async def test_a_client_that_has_everything_may_leave(self, world):
        exchange = world.opened()
        exchange.on_data(b"data: [DONE]\n\n")
        world.driver.cancel(exchange)
        assert not world.told
        assert world.driver.exchanges

    async def test_another_of_the_same_name_stays(self, world):
        exchange = world.opened()
        other = world.exchange()
        world.driver.cancel(other)
        world.driver.break_off(other, RuntimeError())
        assert world.driver.exchanges == {"a": exchange}
        assert world.told == [("router.on_cancel", "a", NOW_S)]

    async def test_what_even_the_router_cannot_end_is_logged(self, world, caplog):
        exchange = world.opened()
        world.replies["router.on_cancel"] = RuntimeError("broken")
        with caplog.at_level(logging.ERROR):
            world.driver.break_off(exchange, RuntimeError("ours"))
        assert "request a cannot be taken from the router" in caplog.text
        assert "broken" in caplog.text
        assert not world.driver.exchanges

    async def test_what_a_client_has_taken_is_acknowledged_by_halves_of_the_window(self, world):
        exchange = world.opened(num_attempts=2)
        attempt = exchange.attempts[0]
        world.driver.acknowledge_bytes(exchange, 20)
        world.driver.acknowledge_bytes(exchange, 29)
        assert not world.told
        world.driver.acknowledge_bytes(exchange, 1)
        world.driver.acknowledge_bytes(exchange, 70)
        assert world.told == [
            ("engines.acknowledge_bytes", attempt, 50),
            ("engines.acknowledge_bytes", attempt, 70),
        ]
        world.told.clear()
        exchange.attempts.clear()
        world.driver.acknowledge_bytes(exchange, 7)
        assert world.told == [("providers.acknowledge_bytes", exchange, 7)]

    async def test_half_of_an_odd_window_is_the_lower_one(self):
        world = World(window_bytes=101)
        exchange = world.opened(num_attempts=1)
        world.driver.acknowledge_bytes(exchange, 50)
        assert world.told == [("engines.acknowledge_bytes", exchange.attempts[0], 50)]


class TestPeople:
    async def test_switch_the_policy(self, world):
        world.driver.set_policy("random", ("hold",))
        world.driver.set_policy("random")
        assert world.told == [
            ("router.set_policy", "random", NOW_S, ("hold",)),
            ("router.set_policy", "random", NOW_S, ()),
        ]

    async def test_name_the_providers(self, world):
        config = SimpleNamespace(providers=("p",), fallback="f")
        world.driver.use_providers(config)
        assert world.told == [
            ("providers.use_config", config),
            ("router.providers.use", ("p",), "f", NOW_S, "make_limiter"),
        ]


class TestDecisions:
    @pytest.mark.parametrize(
        ("due_s", "put_off_s", "priority"),
        [(60.25, 7.0, 1_010_250), (None, 1.5, 1500), (None, 0.0, 0)],
    )
    async def test_dispatch(self, world, due_s, put_off_s, priority):
        exchange = world.opened(put_off_s=put_off_s)
        exchange.reply.receive(b"x", record(5))
        world.replies["discipline.engine_priority_s"] = due_s
        decision = Dispatch("a", "r0", 3)
        world.driver.execute([decision])
        resume = exchange.reply.resume()
        assert isinstance(resume, Resume)
        assert world.told == [
            ("discipline.engine_priority_s", exchange.request),
            ("engines.submit", exchange, decision, priority, resume),
        ]

    async def test_withdraw_and_hold(self, world):
        world.replies["engines.get"] = "the attempt"
        world.opened("a")
        world.driver.execute([Withdraw("a", "r1", 7), Hold("a")])
        assert world.told == [("engines.get", "r1", 7), ("engines.cancel", "the attempt")]

    async def test_fall_back(self, world):
        exchange, decision = world.opened(), Fallback("a", "p0", "default")
        world.driver.execute([decision])
        assert exchange.was_sent
        assert world.told == [("providers.start_call", exchange, decision, world.driver)]

    async def test_reject_and_fail(self, world):
        exchange, other = world.opened("a"), world.opened("b")
        other.failure = "it was lost"
        world.driver.execute([Reject("a", RejectReason.HOPELESS, 7.0), Fail("b")])
        rejected, failed = await error_of(exchange), await error_of(other)
        assert isinstance(rejected, Rejected)
        assert (rejected.reason, rejected.retry_after_s) == (RejectReason.HOPELESS, 7.0)
        assert isinstance(failed, EngineFailed)
        assert str(failed) == "it was lost"
        assert not world.driver.exchanges

    async def test_evacuate(self, world, caplog):
        exchange = world.opened(num_attempts=2)
        world.replies["engines.at_replica"] = exchange.attempts
        with caplog.at_level(logging.WARNING):
            world.driver.execute([Evacuate("r0", "hung")])
        assert "engine r0 is left: hung" in caplog.text
        names = [each[0] for each in world.told]
        assert names == [
            "engines.at_replica",
            *["engines.cancel", "router.failures.on_attempt_failed"] * 2,
        ]
        assert world.told[0][1] == "r0"
        assert [each[1] for each in world.told[1::2]] == exchange.attempts
        assert world.told[2][1:5] == ("a", "r0", None, NOW_S)
        assert exchange.failure == "it is hung"


class TestTimer:
    def timers(self, world, monkeypatch) -> list[tuple]:
        """The timers that are set, as seconds and what for; a cancelled one is None."""
        timers: list = []
        loop = asyncio.get_running_loop()

        def call_later(delay_s: float, callback: Callable[[], None]):
            number = len(timers)
            timers.append((delay_s, callback))
            return SimpleNamespace(cancel=lambda: timers.__setitem__(number, None))

        monkeypatch.setattr(loop, "call_later", call_later)
        return timers

    async def test_is_set_when_the_router_wants_it(self, world, monkeypatch):
        timers = self.timers(world, monkeypatch)
        for wake_s, expected in (
            (None, []),
            (52.0, [2.0]),
            (52.0, [2.0]),  # as before
            (51.0, [None, 1.0]),
            (51.5, [None, 1.0]),  # that one rings before it
            (49.0, [None, None, 0.0]),  # overdue
            (None, [None, None, 0.0]),  # it rings for nothing
        ):
            world.replies["router.next_wake_s"] = wake_s
            world.driver.execute([])
            assert [timer and timer[0] for timer in timers] == expected
        assert not world.told

    async def test_tells_the_router_that_it_is_time(self, world, monkeypatch):
        timers = self.timers(world, monkeypatch)
        world.replies["router.next_wake_s"] = NOW_S
        world.driver.execute([])
        timers[0][1]()
        assert world.told == [("router.on_tick", NOW_S)]
        assert [timer[0] for timer in timers] == [0.0, 0.0]  # and again

    @pytest.mark.parametrize(
        ("wake_s", "again_s"), [(52.0, [2.0]), (NOW_S + 1e-4, [1e-3]), (None, [])]
    )
    async def test_is_set_again_where_it_rings_too_early(self, world, monkeypatch, wake_s, again_s):
        timers = self.timers(world, monkeypatch)
        world.replies["router.next_wake_s"] = 51.0
        world.driver.execute([])
        world.replies["router.next_wake_s"] = wake_s
        timers[0][1]()
        assert not world.told
        assert [timer[0] for timer in timers[1:]] == pytest.approx(again_s)
        world.replies["router.next_wake_s"] = 51.0
        world.driver.execute([])
        assert len(timers) == (3 if wake_s == 52.0 else 2)

    async def test_stops_with_the_driver(self, world, monkeypatch):
        timers = self.timers(world, monkeypatch)
        exchange = world.opened()
        world.replies["router.next_wake_s"] = 52.0
        world.driver.execute([])
        world.driver.close()
        assert timers == [None]
        assert world.told == [
            ("providers.cancel_call", exchange),
            ("router.on_cancel", "a", NOW_S, exchange.usage_taken()),
            ("providers.close",),
            ("engines.close",),
        ]
        error = await error_of(exchange)
        assert isinstance(error, EngineFailed)
        assert str(error) == "the gateway stops"
        world.driver.exchanges.clear()
        World().driver.close()  # also without a timer
