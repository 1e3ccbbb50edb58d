"""Which way the last requests took: what is kept is bounded, and says why one was held."""

import asyncio
from types import SimpleNamespace

import msgspec

from serving.gateway.observe.recent import Recent, RequestWay
from serving.gateway.tenants.keys import KeysFile, make_key
from tests.support.fakes import INFO
from tests.support.running_gateway import CHAT, running

REQUESTS = "/headway/requests"


async def way_of(system, request_id: str, **options) -> RequestWay:
    reply = await system.client.get(REQUESTS, params={"id": request_id}, **options)
    assert reply.status_code == 200, reply.text
    return msgspec.json.decode(reply.content, type=RequestWay)


def told(way: RequestWay) -> list[str]:
    return [event.what for event in way.events]


async def test_a_request_that_is_answered():
    async with running(num_engines=1) as system:
        reply = await system.client.post(
            CHAT, json=system.chat(max_tokens=3), headers={"x-request-id": "mine/1 a"}
        )
        assert reply.status_code == 200
        way = await way_of(system, "mine/1 a")
        assert told(way) == ["arrived", "sent", "first_token", "over"]
        assert (way.outcome, way.status, way.is_over) == ("completed", 200, True)
        _, sent, first, over = way.events
        assert (sent.where, first.where) == ("r0", "r0")
        assert sent.predicted_ttft_s > 0
        assert sent.after_s <= first.after_s <= over.after_s
        [same] = (await system.client.get(REQUESTS)).json()
        assert same["id"] == "mine/1 a"


async def test_a_held_request_says_why():
    """The only engine runs one at a time; while it waits, and when it is over."""
    small = msgspec.structs.replace(INFO, max_num_seqs=1)
    async with running(num_engines=0) as system:
        engine = await system.add_engine(info=small)
        engine.gate.clear()
        chat = system.chat(max_tokens=2)
        ids = ("a", "b")
        posts = []
        for each in ids:
            headers = {"x-request-id": each}
            posts.append(
                asyncio.ensure_future(system.client.post(CHAT, json=chat, headers=headers))
            )
            number = len(posts)
            await system.until(lambda n=number: len(system.gateway.driver.exchanges) == n)
        way = await way_of(system, "b")
        assert told(way) == ["arrived", "held"]
        assert (way.is_over, way.outcome, way.status) == (False, "", 0)
        why = "of 1 engines 1 ran as many sequences as it may"
        assert way.events[1].why == why
        engine.gate.set()
        assert [reply.status_code for reply in await asyncio.gather(*posts)] == [200, 200]
        way = await way_of(system, "b")
        assert told(way) == ["arrived", "held", "sent", "first_token", "over"]
        assert way.events[1].why == why
        assert told(await way_of(system, "a")) == ["arrived", "sent", "first_token", "over"]


async def test_what_was_refused_says_why():
    async with running(num_engines=0, router={"max_held_requests": 0}) as system:
        headers = {"x-request-id": "full"}
        reply = await system.client.post(CHAT, json=system.chat(), headers=headers)
        assert reply.status_code == 429
        way = await way_of(system, "full")
        assert told(way) == ["arrived", "over"]
        assert (way.outcome, way.status) == ("rejected", 429)
        assert way.events[-1].why == "queue_full"


async def test_only_an_admin_may_ask(tmp_path):
    path = tmp_path / "keys.json"
    texts = {}
    with KeysFile(path) as file:
        for name, admin in (("acme", False), ("ops", True)):
            texts[name], key = make_key(name, admin=admin)
            file.keys.append(key)
        file.save()
    async with running(num_engines=1, auth={"keys_file": str(path)}) as system:
        ask = {name: {"authorization": f"Bearer {text}"} for name, text in texts.items()}
        headers = {**ask["acme"], "x-request-id": "mine"}
        await system.client.post(CHAT, json=system.chat(), headers=headers)
        for options, status in (({}, 401), ({"headers": ask["acme"]}, 403)):
            reply = await system.client.get(REQUESTS, params={"id": "mine"}, **options)
            assert reply.status_code == status
        assert (await way_of(system, "mine", headers=ask["ops"])).tenant == "acme"
        unknown = await system.client.get(REQUESTS, params={"id": "no"}, headers=ask["ops"])
        assert unknown.status_code == 404
        assert unknown.json()["error"]["message"].startswith("gateway 0 knows no request 'no'")


async def test_what_is_kept_is_bounded():
    async with running(num_engines=1) as system:
        driver = system.gateway.driver
        driver.recent = recent = Recent(driver.exchanges, driver.router.state, max_kept=2)
        for number in range(4):
            headers = {"x-request-id": str(number)}
            await system.client.post(CHAT, json=system.chat(), headers=headers)
        await system.until(lambda: recent.find("3") is not None)
        assert [way.id for way in recent.last()] == ["3", "2"]
        assert recent.find("1") is None


def test_engines_are_looked_at_four_times_a_second_at_most():
    looks = []

    def state(now_s: float) -> SimpleNamespace:
        looks.append(now_s)
        return SimpleNamespace(replicas={}, held=SimpleNamespace(num_requests=7))

    recent = Recent({}, state)
    for now_s in (0.0, 0.1, 0.2, 0.3, 0.5, 0.6):
        exchange = SimpleNamespace(
            journey=SimpleNamespace(held_by=None), request=SimpleNamespace(model="m")
        )
        recent.on_hold(exchange, now_s)
        recent.on_hold(exchange, now_s + 9.0)  # of it we know already
    assert looks == [0.0, 0.3, 0.6]
