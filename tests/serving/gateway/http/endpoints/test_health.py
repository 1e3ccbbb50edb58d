"""Is the gateway alive, and would a request be answered?"""

import asyncio

import pytest

from router.resilience.breaker import BreakerState, TripReason
from serving.gateway.intake.served_models import ModelEntry
from serving.gateway.tenants.keys import KeysFile, make_key
from tests.support.running_gateway import CHAT, running

MODEL = "fake-model"


async def _health(system, path: str = "/health", **kwargs):
    reply = await system.client.get(path, **kwargs)
    return reply.status_code, reply.json()


async def test_a_gateway_without_engines_lives_and_is_not_ready():
    async with running(num_engines=0) as system:
        assert await _health(system, "/health/live") == (200, {"status": "ok"})
        for path in ("/health", "/health/ready", "/-/healthz"):
            status, health = await _health(system, path)
            assert status == 503
            assert health == {
                "status": "no engine",
                "is_ready": False,
                "num_engines": 0,
                "num_ready": 0,
                "models": {},
            }


async def test_it_is_ready_while_an_engine_takes_requests():
    async with running(num_engines=2) as system:
        status, health = await _health(system)
        assert status == 200
        assert health["status"] == "ok"
        assert health["num_engines"] == health["num_ready"] == 2
        each = {"num_engines": 2, "num_ready": 2, "has_provider": False, "is_ready": True}
        assert health["models"] == {MODEL: each}


async def test_an_engine_with_an_open_breaker_is_not_ready():
    async with running(num_engines=2) as system:
        engines = list(system.gateway.router._fleet)
        for number, engine in enumerate(engines, start=1):
            engine.breaker.trip(TripReason.HUNG, 1e9)
            status, health = await _health(system)
            assert status == (200 if number == 1 else 503)
            assert health["num_ready"] == health["models"][MODEL]["num_ready"] == 2 - number
        assert health["status"] == "no engine takes requests"
        assert health["num_engines"] == 2
        assert (await _health(system, "/health/live"))[0] == 200


async def test_the_only_engine_hangs_and_the_gateway_is_not_ready():
    """By its breaker, as it would in earnest: requests go in and no step comes out."""
    settings = {"hang_s": 0.3, "stale_s": 10.0}
    async with running(num_engines=1, router=settings) as system:
        system.engines[0].gate.clear()
        asking = asyncio.create_task(system.client.post(CHAT, json=system.chat()))
        [replica] = system.gateway.router._fleet
        await system.until(lambda: replica.breaker.status is BreakerState.OPEN)
        status, health = await _health(system, "/health/ready")
        assert status == 503
        assert health["models"][MODEL]["is_ready"] is False
        system.engines[0].gate.set()
        assert (await asking).status_code == 200


async def test_while_the_last_engine_is_emptied_a_request_has_it_kept():
    """Or another one started: the gateway is as ready as it will be without any."""
    async with running(num_engines=1) as system:
        engines = system.gateway.driver.engines
        engines.empty(["r0"])
        assert (await _health(system))[0] == 503  # nobody starts engines here
        entry = ModelEntry(deployment="Engine", names=(MODEL,), scales=True)
        system.gateway.served_models.use_entries([entry])
        status, health = await _health(system)
        assert (status, health["num_ready"]) == (200, 0)
        assert health["status"] == "no engine: a request has one started"
        engines.empty([])
        [replica] = system.gateway.router._fleet
        replica.breaker.trip(TripReason.HUNG, 1e9)
        assert (await _health(system))[0] == 503


async def test_a_server_that_takes_no_connections_is_not_taken_back_by_the_autoscaler():
    async with running(num_engines=1) as system:
        engines = system.gateway.driver.engines
        [replica] = system.gateway.router._fleet
        engines.on_leaving(engines._connections["r0"], is_leaving=True)
        for emptied in (["r0"], []):
            engines.empty(emptied)
            assert replica.is_draining
        engines.on_leaving(engines._connections["r0"], is_leaving=False)
        assert not replica.is_draining


async def test_a_half_open_breaker_lets_requests_come():
    """Only one of them can show that the engine works again."""
    async with running(num_engines=1, router={"breaker": {"cooldown_s": 0.05}}) as system:
        [engine] = system.gateway.router._fleet
        engine.breaker.trip(TripReason.LOST, 0.0)
        engine.breaker.tick(1e9)
        assert (await _health(system))[0] == 200


async def test_names_of_models_are_for_holders_of_keys_that_may_use_them(tmp_path):
    path = tmp_path / "keys.json"
    with KeysFile(path) as file:
        text, key = make_key("acme")
        limited_text, limited_key = make_key("limited")
        file.keys += [key, limited_key]
        file.save()
    limits = {"limited": {"models": ["another"]}}
    async with running(num_engines=1, auth={"keys_file": str(path)}, tenants=limits) as system:
        for headers in ({}, {"authorization": "Bearer wrong"}):
            status, health = await _health(system, headers=headers)
            assert status == 200
            assert health["num_ready"] == 1
            assert "models" not in health
        headers = {"authorization": f"Bearer {text}"}
        assert MODEL in (await _health(system, headers=headers))[1]["models"]
        headers = {"authorization": f"Bearer {limited_text}"}
        assert (await _health(system, headers=headers))[1]["models"] == {}


@pytest.mark.parametrize("engines", [0, 1])
async def test_a_provider_stands_in(engines):
    provider = {"name": "p", "url": "http://127.0.0.1:9/v1", "models": {"other": "theirs"}}
    async with running(num_engines=engines, providers=[provider]) as system:
        status, health = await _health(system)
        assert status == 200
        assert health["status"] == ("ok" if engines else "providers only")
        assert health["models"]["other"]["is_ready"] is True
        assert health["models"]["other"]["num_engines"] == 0
