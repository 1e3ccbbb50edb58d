"""What `/headway/state` shows, held against the types and the schema that are published for it."""

import asyncio

import msgspec
import pytest

from serving.core_form import form
from serving.gateway.observe.state import GatewayState
from serving.gateway.tenants.keys import KeysFile, make_key
from tests.support.running_gateway import CHAT, running

PROVIDER = {
    "name": "p0",
    "url": "http://127.0.0.1:1/v1",
    "models": {"fake-model": "theirs"},
    "keys": [{"name": "k", "rpm": 10}],
}


@pytest.fixture
def keys(tmp_path):
    """The keys file and the headers of a user and of an admin."""
    headers = []
    with KeysFile(tmp_path / "keys.json") as file:
        for tenant, admin in (("acme", False), ("ops", True)):
            text, key = make_key(tenant, admin=admin)
            file.keys.append(key)
            headers.append({"authorization": f"Bearer {text}"})
        file.save()
    return tmp_path / "keys.json", *headers


def unlisted(value, schema: dict, defs: dict, path: str = "state") -> list[str]:
    """Where a value and its schema differ: fields that one has and the other has not."""
    if "$ref" in schema:
        schema = defs[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        return min((unlisted(value, each, defs, path) for each in schema["anyOf"]), key=len)
    if isinstance(value, list) and "items" in schema:
        return [
            found
            for number, each in enumerate(value)
            for found in unlisted(each, schema["items"], defs, f"{path}[{number}]")
        ]
    if not isinstance(value, dict):
        return []
    listed, rest = schema.get("properties", {}), schema.get("additionalProperties")
    found = [f"{path}.{name}" for name in schema.get("required", ()) if name not in value]
    for name, each in value.items():
        inner = listed.get(name, rest)
        if inner is None:
            found.append(f"{path}.{name}")
        else:
            found += unlisted(each, inner, defs, f"{path}.{name}")
    return found


async def test_a_live_state_is_what_its_schema_says(keys):
    """Engines at work and one lost, held and ended requests, a provider, tenants, a file."""
    keys_file, user, admin = keys
    async with running(
        auth={"keys_file": str(keys_file)},
        tenants={"acme": {"requests_per_min": 100}},
        fallback={"spill": "unavailable"},
        providers=[PROVIDER],
    ) as system:
        reply = await system.client.post(CHAT, json=system.chat(), headers=user)
        assert reply.status_code == 200
        for engine in system.engines:
            engine.gate.clear()
        tasks = [
            asyncio.create_task(system.client.post(CHAT, json=system.chat(), headers=user))
            for _ in range(2)
        ]
        await system.until(lambda: system.num_engine_streams == 2)
        system.servers[0].close()
        await system.until(lambda: system.gateway.state().breaker_events)
        reply = await system.client.get("/headway/state", headers=admin)
        schema = (await system.client.get("/headway/state/schema", headers=admin)).json()
        for engine in system.engines:
            engine.gate.set()
        await asyncio.gather(*tasks)
    live = reply.json()
    state = msgspec.json.decode(reply.content, type=GatewayState)
    assert state.core == form()
    assert state.outcomes["completed"] == 1
    assert state.tenants.by_name["acme"].num_requests == 3
    assert [event.reason for event in state.breaker_events] == ["lost"]
    assert any(replica.snapshot is not None for replica in state.replicas.values())
    assert state.fallback.providers["p0"].keys["k"].budget.requests.limit == 10
    # Nothing in it that the types do not know, and nothing that the schema does not list.
    assert msgspec.json.decode(msgspec.json.encode(state)) == live
    assert unlisted(live, schema, schema["$defs"]) == []
    del live["held"]["num_bytes"]
    live["replicas"]["x"] = {"info": {}, "new": 0}
    assert {"state.held.num_bytes", "state.replicas.x.new"} <= set(
        unlisted(live, schema, schema["$defs"])
    )


async def test_the_schema_is_guarded_as_the_state_is(keys):
    keys_file, user, admin = keys
    async with running(num_engines=0, auth={"keys_file": str(keys_file)}) as system:
        for path in ("/headway/state", "/headway/state/schema"):
            for headers, status in (({}, 401), (user, 403), (admin, 200)):
                reply = await system.client.get(path, headers=headers)
                assert reply.status_code == status
