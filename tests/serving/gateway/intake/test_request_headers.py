"""What headers say, and which of them vLLM hears of."""

import ast
import asyncio
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from router import RequestClass
from serving.gateway.http.errors import ApiError
from serving.gateway.intake.request_headers import FORWARDED, read_headers
from tests.support.running_gateway import CHAT, running


def test_what_means_something_is_read():
    headers = read_headers(
        [
            (b"authorization", b"Bearer secret"),
            (b"x-request-id", b"mine"),
            (b"x-headway-class", b"batch"),
            (b"x-vllm-priority", b"-3"),
            (b"traceparent", b"00-1-2-3"),
            (b"cookie", b"a=b"),
        ]
    )
    assert (headers.request_id, headers.request_class) == (b"mine", RequestClass.BATCH)
    assert headers.priority == -3
    assert headers.forwarded == [(b"x-vllm-priority", b"-3"), (b"traceparent", b"00-1-2-3")]
    with pytest.raises(ApiError):
        read_headers([(b"x-headway-class", b"royal")])


@pytest.mark.parametrize("value", [b"urgent", b"1.5", b"", b"9" * 30])
def test_a_priority_that_vllm_would_ignore_is_none(value):
    assert read_headers([(b"x-vllm-priority", value)]).priority is None


def test_all_that_vllm_reads_is_passed_on():
    """By its source: whatever its layer asks a request's headers for, at our endpoints."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("vLLM is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "entrypoints"
    constants: dict[str, str] = {}
    asked: set[str] = set()
    for path in folder.rglob("*.py"):
        if {"cohere", "anthropic", "sagemaker", "speech_to_text"} & set(path.parts):
            continue  # endpoints that are not served here
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                for target in node.targets:
                    if isinstance(target, ast.Name) and isinstance(node.value.value, str):
                        constants[target.id] = node.value.value
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "get"
                and re.search(
                    r"request\w*\.headers$|request_headers$", ast.unparse(node.func.value)
                )
            ):
                asked.add(ast.unparse(node.args[0]))
    names = {constants.get(each, each).strip("'\"").lower() for each in asked}
    # Ours to say: the id (`RequestPath`), and that the body is JSON; whoever is asked for a key
    # has given it to us.
    ours = {"x-request-id", "content-type", "authorization"}
    assert {name.decode() for name in FORWARDED} >= names - ours
    assert {"x-request-id", "x-vllm-priority", "endpoint-load-metrics-format"} <= names


class TestRequestId:
    """vLLM names its reply by it; so does the reply's header."""

    @pytest.mark.parametrize(
        "sent",
        [b"mine", b"a b", b"x" * 5000, b"\xe9\xff", b'"quoted"; <b>', b"../../x", b"0", b"%0a"],
    )
    async def test_any_is_taken_as_it_is(self, sent):
        async with running(num_engines=1) as system:
            seen = spy(system)
            reply = await system.client.post(
                CHAT, json=system.chat(), headers=[(b"x-request-id", sent)]
            )
            assert reply.status_code == 200
            assert [value for name, value in reply.headers.raw if name == b"x-request-id"] == [sent]
            assert seen[0][b"x-request-id"] == sent

    async def test_without_one_it_gets_one(self):
        async with running(num_engines=1) as system:
            seen = spy(system)
            replies = [await system.client.post(CHAT, json=system.chat()) for _ in range(2)]
            ids = [reply.headers["x-request-id"].encode() for reply in replies]
            assert [each[b"x-request-id"] for each in seen] == ids
            assert len(set(ids)) == 2

    async def test_that_of_the_body_counts_where_there_is_no_header(self):
        async with running(num_engines=1) as system:
            seen = spy(system)
            body = system.chat(request_id="from-the-body")
            reply = await system.client.post(CHAT, json=body)
            assert reply.headers["x-request-id"] == "from-the-body"
            assert b"x-request-id" not in seen[0]  # before which the body's would not count
            assert system.engines[0].bodies[0]["request_id"] == "from-the-body"
            headers = {"x-request-id": "from-the-header"}
            reply = await system.client.post(CHAT, json=body, headers=headers)
            assert reply.headers["x-request-id"] == "from-the-header"
            assert seen[1][b"x-request-id"] == b"from-the-header"

    async def test_the_same_many_times_at_once(self):
        """Also while the store is being asked, which others may be meanwhile."""
        async with running(num_engines=1, cache={"enabled": True}) as system:
            store = system.gateway.cache._store
            get = store.get

            async def get_slowly(key: str):
                await asyncio.sleep(0.05)
                return await get(key)

            store.get = get_slowly
            headers = {"x-request-id": "same"}
            replies = await asyncio.gather(
                *(
                    system.client.post(
                        CHAT, json=system.chat(temperature=0, seed=seed // 2), headers=headers
                    )
                    for seed in range(10)
                )
            )
            assert {reply.status_code for reply in replies} == {200}
            assert {reply.headers["x-request-id"] for reply in replies} == {"same"}
            assert all(reply.text.endswith("data: [DONE]\n\n") for reply in replies)
            system.assert_empty()


def spy(system) -> list[dict[bytes, bytes]]:
    """The headers of each request that the first engine gets."""
    seen: list[dict[bytes, bytes]] = []
    engine = system.engines[0]
    app = engine.app

    async def seeing(scope, receive, send):
        seen.append(dict(scope["headers"]))
        await app(scope, receive, send)

    engine.app = seeing
    return seen
