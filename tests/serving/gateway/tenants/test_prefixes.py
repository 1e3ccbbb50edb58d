"""Does anything tell a tenant what others have asked? Engines keep what they have computed."""

import pytest

from router.simulation.engine.profile import Profile
from serving.capacity.profiles import save_profile
from serving.engine.emulated.engine import EmulatedArgs, EmulatedEngine
from serving.stream.server import StreamServer
from tests.serving.gateway.tenants.office import Office
from tests.support.running_gateway import CHAT

TEXT = [{"role": "user", "content": "our secret plan " * 30}]


@pytest.fixture
def office(tmp_path):
    return Office(tmp_path)


async def add_engine(system, folder) -> None:
    """One that keeps blocks of 16 tokens."""
    profile = Profile(
        name="small",
        model="small",
        device="none",
        source="made up",
        max_model_len=2000,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        num_kv_tokens=4000,
        base_s=0.002,
        s_per_token=1e-6,
    )
    save_profile(profile, folder / "small.yaml")
    engine = EmulatedEngine(EmulatedArgs(profile=str(folder / "small.yaml")))
    server = StreamServer(engine, 64 * 2**10)
    system.servers.append(server)
    host, port = await server.listen("127.0.0.1")
    system.members["e"] = {"host": host, "port": port, "secret": server.secret}
    system.gateway.driver.engines.set_members(system.members)
    await system.until(lambda: system.gateway.driver.engines.infos)


async def num_cached(system, headers, **fields) -> int:
    """Tokens of the prompt that the reply says were there already."""
    body = {"messages": TEXT, "max_tokens": 2, "stream": False, **fields}
    reply = await system.client.post(CHAT, json=body, headers=headers)
    assert reply.status_code == 200
    return reply.json()["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0)


async def test_a_prompt_is_found_again_for_its_own_tenant_alone(office, tmp_path):
    one, two = office.hire("one"), office.hire("two")
    async with office.running(num_engines=0) as system:
        await add_engine(system, tmp_path)
        assert await num_cached(system, one) == 0
        assert await num_cached(system, two) == 0
        assert await num_cached(system, one) > 50
        assert await num_cached(system, two) > 50
        # Whatever salt one asks for, it stays among its own.
        assert await num_cached(system, one, cache_salt="mine") == 0
        assert await num_cached(system, one, cache_salt="mine") > 50
        assert await num_cached(system, two, cache_salt="mine") == 0


async def test_tenants_may_share(office, tmp_path):
    one, two = office.hire("one"), office.hire("two")
    auth = {"share_prefix_cache": True}
    async with office.running(num_engines=0, auth=auth) as system:
        await add_engine(system, tmp_path)
        assert await num_cached(system, one) == 0
        assert await num_cached(system, two) > 50


async def test_the_body_reaches_the_engine_as_it_was_but_for_the_salt(office):
    headers = office.hire("acme")
    async with office.running(num_engines=1) as system:
        body = system.chat(cache_salt="own", metadata={"a": "}"}, guided="thing")
        await system.client.post(CHAT, json=body, headers=headers)
        [seen] = system.engines[0].bodies
        assert seen.pop("cache_salt") != body.pop("cache_salt")
        assert seen == body
