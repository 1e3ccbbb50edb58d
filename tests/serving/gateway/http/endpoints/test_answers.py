"""Endpoints that run no model, over sockets: who is asked, and what is answered."""

import asyncio
import json

import msgspec
import pytest
from starlette.types import Receive, Scope, Send

from tests.serving.gateway.tenants.office import Office
from tests.support.fakes import INFO, FakeEngine
from tests.support.running_gateway import System, running

ROUTES = (
    "GET /version",
    "POST /tokenize",
    "POST /v1/load_lora_adapter",
    "POST /v1/messages",
    "POST /v1/responses",
    "GET /v1/responses/{response_id}",
    "POST /v1/responses/{response_id}/cancel",
    "POST /v1/audio/transcriptions",
)


class Answering:
    """Says who was asked for what; runs what has `max_tokens` as any fake does."""

    def __init__(self, engine: FakeEngine, name: str) -> None:
        self.name = name
        self.asked: list[tuple[str, str, bytes, dict]] = []
        self.status = 200
        self.kept: set[str] = set()
        self.held = asyncio.Event()
        self.held.set()
        self._run = engine.app
        engine.app = self  # type: ignore[assignment]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in ("/v1/messages", "/v1/responses") and self.status == 200:
            await self._run(scope, receive, send)
            return
        body = (await receive())["body"]
        self.asked.append((scope["method"], scope["path"], body, dict(scope["headers"])))
        await self.held.wait()
        status, said = self.status, {"by": self.name, "query": scope["query_string"].decode()}
        if (
            scope["path"].startswith("/v1/responses/")
            and scope["path"].split("/")[3] not in self.kept
        ):
            status = 404
        if status >= 400:
            said = {"error": {"message": "no", "type": "T", "param": None, "code": status}}
        await send({"type": "http.response.start", "status": status, "headers": JSON})
        await send({"type": "http.response.body", "body": json.dumps(said).encode()})


JSON = [(b"content-type", b"application/json"), (b"x-request-id", b"vllms-own")]


@pytest.fixture
def office(tmp_path) -> Office:
    return Office(tmp_path)


async def answering(system: System, **fields) -> Answering:
    info = msgspec.structs.replace(INFO, routes=ROUTES, **fields)
    engine = await system.add_engine(info=info)
    return Answering(engine, f"r{len(system.engines) - 1}")


async def test_one_engine_tells():
    async with running(num_engines=0) as system:
        one = await answering(system)
        reply = await system.client.get("/version?a=b", headers={"x-request-id": "mine"})
        assert reply.json() == {"by": "r0", "query": "a=b"}
        assert reply.headers.get_list("x-request-id") == ["mine"]
        assert one.asked[0][3][b"x-request-id"] == b"mine"
        assert system.gateway.state().outcomes["completed"] == 0
        system.assert_empty()


async def test_the_one_with_the_least_work_is_asked():
    async with running(num_engines=0) as system:
        busy, idle = await answering(system), await answering(system)
        body = system.chat(max_tokens=3, model="fake-model")
        system.engines[0].gate.clear()
        system.engines[1].gate.clear()
        chat = asyncio.ensure_future(system.client.post("/v1/messages", json=body))
        await system.until(lambda: system.num_engine_streams == 1)
        number = 0 if system.servers[0].num_streams else 1
        engines = system.gateway.driver.engines
        await system.until(lambda: engines._work(f"r{number}")[1] == 1)
        reply = await system.client.post("/tokenize", json={"prompt": "hi"})
        assert reply.json()["by"] == f"r{1 - number}"
        for engine in system.engines:
            engine.gate.set()
        await chat
        assert len(busy.asked) + len(idle.asked) == 1


async def test_another_one_is_asked_where_the_first_is_lost():
    async with running(num_engines=0) as system:
        first, second = await answering(system), await answering(system)
        first.held.clear()
        asking = asyncio.ensure_future(system.client.get("/version"))
        await system.until(lambda: first.asked or second.asked)
        assert first.asked
        system.servers[0].close()
        assert (await asking).json()["by"] == "r1"
        assert len(system.gateway.driver.engines.questions) == 0


async def test_who_leaves_is_not_answered():
    async with running(num_engines=0) as system:
        one = await answering(system)
        one.held.clear()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await system.client.get("/version")
        one.held.set()
        await system.until(lambda: len(system.gateway.driver.engines.questions) == 0)


async def test_of_several_models_an_engine_of_the_right_one_tells():
    async with running(num_engines=0) as system:
        await answering(system)
        await answering(system, model="other")
        for model, name in (("fake-model", "r0"), ("other", "r1")):
            reply = await system.client.post("/tokenize", json={"model": model, "prompt": "hi"})
            assert reply.json()["by"] == name
        reply = await system.client.post("/tokenize", json={"model": "none", "prompt": "hi"})
        assert (reply.status_code, reply.json()["error"]["param"]) == (404, "model")


async def test_what_no_engine_has():
    async with running(num_engines=0) as system:
        reply = await system.client.get("/version")
        assert reply.status_code == 503
        await answering(system)
        reply = await system.client.post("/sleep")
        assert reply.status_code == 404
        assert "VLLM_SERVER_DEV_MODE=1" in reply.json()["error"]["message"]
        reply = await system.client.post("/v1/rerank", json={"query": "a", "documents": ["b"]})
        assert reply.status_code == 400
        assert "POST /v1/rerank" in reply.json()["error"]["message"]


async def test_what_is_refused_says_why():
    async with running(num_engines=1) as system:
        reply = await system.client.post("/collective_rpc", json={})
        assert reply.status_code == 404
        assert "any method of an engine's workers" in reply.json()["error"]["message"]


async def test_every_engine_is_asked_and_each_has_its_say():
    async with running(num_engines=0) as system:
        one, other = await answering(system), await answering(system)
        other.status = 400
        reply = await system.client.post("/v1/load_lora_adapter", json={"lora_name": "a"})
        assert reply.status_code == 400
        engines = reply.json()["engines"]
        assert engines["r0"] == {"status": 200, "answer": {"by": "r0", "query": ""}}
        assert engines["r1"]["status"] == 400
        assert [each.asked[0][2] for each in (one, other)] == [b'{"lora_name":"a"}'] * 2
        page = {"origin": "https://evil.example"}
        reply = await system.client.post("/v1/load_lora_adapter", json={}, headers=page)
        assert reply.status_code == 403


async def test_it_takes_an_admin_to_ask_all(office: Office):
    clerk, boss = office.hire("acme"), office.hire("acme", admin=True)
    async with office.running(num_engines=0) as system:
        await answering(system)
        assert (await system.client.get("/version")).status_code == 401
        assert (await system.client.get("/version", headers=clerk)).status_code == 200
        path = "/v1/load_lora_adapter"
        assert (await system.client.post(path, json={}, headers=clerk)).status_code == 403
        assert (await system.client.post(path, json={}, headers=boss)).status_code == 200


async def test_anthropics_clients_send_their_key_otherwise(office: Office):
    key = office.hire("acme")["authorization"].removeprefix("Bearer ")
    async with office.running(num_engines=0) as system:
        await answering(system)
        assert (await system.client.get("/version", headers={"x-api-key": key})).status_code == 200
        reply = await system.client.post("/v1/messages", json={}, headers={"x-api-key": "wrong"})
        assert reply.status_code == 401
        assert reply.json()["error"]["type"] == "authentication_error"


async def test_what_goes_wrong_with_messages_is_told_in_anthropics_form():
    body = {"model": "fake-model", "messages": [{"role": "user", "content": "hi"}]}
    async with running(num_engines=0, gateway={"keepalive_s": 0.05}) as system:
        one = await answering(system)
        one.status = 400
        for streamed in (False, True):
            reply = await system.client.post("/v1/messages", json={**body, "stream": streamed})
            assert reply.status_code == 400
            assert reply.json() == {
                "type": "error",
                "error": {"type": "invalid_request_error", "message": "no"},
            }
        one.held.clear()
        asking = system.client.post("/v1/messages", json={**body, "stream": True})
        asking = asyncio.ensure_future(asking)
        await system.until(lambda: len(one.asked) == 3)
        await asyncio.sleep(0.1)  # a comment has promised a stream
        one.held.set()
        text = (await asking).text
        assert text.startswith(": keep-alive\n\n")
        assert 'event: error\ndata: {"type":"error","error":{"type":"inv' in text


class TestKeptResponses:
    async def test_the_engine_that_keeps_it_answers(self):
        async with running(num_engines=0) as system:
            await answering(system)
            other = await answering(system)
            other.kept.add("resp_1")
            for _ in range(2):
                reply = await system.client.get("/v1/responses/resp_1?stream=false")
                assert reply.json() == {"by": "r1", "query": "stream=false"}
            reply = await system.client.post("/v1/responses/resp_1/cancel")
            assert reply.json()["by"] == "r1"
            reply = await system.client.get("/v1/responses/resp_2")
            assert reply.status_code == 404
            assert reply.json()["error"]["message"].startswith(
                "Response with id 'resp_2' not found. No engine keeps it"
            )

    async def test_what_goes_on_from_it_goes_there(self):
        async with running(num_engines=0) as system:
            for _ in range(3):
                await answering(system)
            for engine in system.engines:
                engine.end = b"event: response.completed\ndata: {}\n\n"
            asked = {"model": "fake-model", "input": "hi", "max_output_tokens": 1}
            for number in range(8):
                first = await system.client.post("/v1/responses", json=asked)
                name = first.headers["x-headway-engine"]
                engine = system.engines[int(name[1:])]
                response_id = engine.bodies[-1]["request_id"]
                assert response_id.startswith("resp_")
                again = {**asked, "previous_response_id": response_id, "n": number}
                second = await system.client.post("/v1/responses", json=again)
                assert second.headers["x-headway-engine"] == name

    async def test_if_its_engine_is_lost_so_is_what_goes_on_from_it(self):
        async with running(num_engines=0) as system:
            for _ in range(2):
                await answering(system)
            asked = {"model": "fake-model", "input": "hi"}
            first = await system.client.post("/v1/responses", json=asked)
            index = int(first.headers["x-headway-engine"][1:])
            response_id = system.engines[index].bodies[-1]["request_id"]
            system.engines[index].gate.clear()
            again = {**asked, "previous_response_id": response_id}
            waiting = asyncio.ensure_future(system.client.post("/v1/responses", json=again))
            await system.until(lambda: system.servers[index].num_streams == 1)
            del system.members[f"r{index}"]
            system.gateway.driver.engines.set_members(system.members)
            system.servers[index].close()
            reply = await waiting
            assert reply.status_code == 404
            assert "The engine that kept it has ended" in reply.json()["error"]["message"]
            reply = await system.client.post("/v1/responses", json=again)
            assert reply.status_code == 404
            system.assert_empty()

    async def test_it_is_its_tenants_alone(self, office: Office):
        ours, theirs = office.hire("acme"), office.hire("globex")
        async with office.running(num_engines=0) as system:
            one = await answering(system)
            asked = {"model": "fake-model", "input": "hi", "request_id": "resp_chosen"}
            await system.client.post("/v1/responses", json=asked, headers=ours)
            response_id = system.engines[0].bodies[-1]["request_id"]
            assert response_id != "resp_chosen"
            one.kept.add(response_id)
            path = f"/v1/responses/{response_id}"
            assert (await system.client.get(path, headers=ours)).status_code == 200
            assert (await system.client.get(path, headers=theirs)).status_code == 404
            again = {"model": "fake-model", "input": "hi", "previous_response_id": response_id}
            reply = await system.client.post("/v1/responses", json=again, headers=theirs)
            assert reply.status_code == 404


async def test_an_upload_passes_as_it_is():
    async with running(num_engines=0) as system:
        one = await answering(system)
        form = {"model": "fake-model", "response_format": "json"}
        sound = bytes(range(256)) * 500
        files = {"file": ("a.wav", sound, "audio/wav")}
        request = system.client.build_request(
            "POST", "/v1/audio/transcriptions", data=form, files=files
        )
        sent = request.read()
        reply = await system.client.send(request)
        assert reply.status_code == 200, reply.text
        _, _, body, headers = one.asked[-1]
        assert body == sent
        assert headers[b"content-type"].decode() == request.headers["content-type"]
        other = await system.client.post(
            "/v1/audio/transcriptions", data={"model": "none"}, files=files
        )
        assert other.status_code == 404
        reply = await system.client.post("/v1/audio/transcriptions", json={"model": "x"})
        assert reply.status_code == 415
        reply = await system.client.post("/v1/audio/transcriptions", data=form, files={"a": b"b"})
        assert reply.json()["error"]["message"] == "'file' is missing or empty"


async def test_what_replies_say_of_their_way_can_be_left_out():
    async with running(num_engines=1, gateway={"reply_headers": False}) as system:
        reply = await system.client.post("/v1/chat/completions", json=system.chat())
        assert "x-headway-engine" not in reply.headers
        assert "x-headway-held-ms" not in reply.headers
