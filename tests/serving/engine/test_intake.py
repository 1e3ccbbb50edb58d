"""What the gateway's intake lets through, a real engine answers as vLLM alone would."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.serving.engine.conftest import Served

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


@pytest.mark.parametrize(
    ("fields", "num_tokens"),
    [
        ({"max_tokens": True}, 1),
        ({"max_tokens": "3"}, 3),
        ({"max_tokens": 3.0}, 3),
        ({"max_tokens": None}, 16),
        ({"model": ""}, 8),
        ({"model": None}, 8),
        ({"n": "2", "temperature": 1}, 16),
        ({"priority_class": "royal"}, 8),
        ({"priority": -(2**63)}, 8),
        ({"prompt": [[5, 6, 7], [8, 9]], "n": 2, "temperature": 1}, 32),
        ({"prompt": ["a", "b", "c"]}, 24),
    ],
)
def test_fields_are_what_vllm_takes_them_for(served: Served, fields: dict, num_tokens: int) -> None:
    reply = served.ask({"prompt": "Once", "ignore_eos": True, **fields})
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] == num_tokens


@pytest.mark.parametrize("stream", ["yes", "1", 1, "ON"])
def test_a_stream_is_what_vllm_takes_for_one(served: Served, stream: Any) -> None:
    reply = served.ask({**CHAT, "stream": stream}, "/v1/chat/completions")
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-be"])
def test_bodies_come_in_any_encoding_of_json(served: Served, encoding: str) -> None:
    text = json.dumps({"model": "tiny", "prompt": "é 漢", "max_tokens": 2}, ensure_ascii=False)
    reply = served.http.post("/v1/completions", content=text.encode(encoding))
    assert reply.status_code == 200, reply.text


class TestIds:
    def ask(self, served: Served, headers: list[tuple[bytes, bytes]], **fields: Any):
        body = {"model": "tiny", "prompt": "Once", "max_tokens": 4, **fields}
        return served.http.post("/v1/completions", json=body, headers=headers)

    @pytest.mark.parametrize("sent", [b"mine", b"a b/c", b"x" * 3000, b"\xe9"])
    def test_a_reply_is_named_by_the_clients(self, served: Served, sent: bytes) -> None:
        reply = self.ask(served, [(b"x-request-id", sent)], request_id="not-this")
        assert reply.json()["id"] == f"cmpl-{sent.decode('latin-1')}"
        assert dict(reply.headers.raw)[b"x-request-id"] == sent

    def test_or_by_the_bodys_or_by_ours(self, served: Served) -> None:
        for fields in ({"request_id": "of-the-body"}, {}):
            reply = self.ask(served, [], **fields)
            shown = reply.headers["x-request-id"]
            assert reply.json()["id"] == f"cmpl-{shown}"
            assert shown == fields.get("request_id", shown)

    def test_many_at_once_may_bear_the_same(self, served: Served) -> None:
        with ThreadPoolExecutor(8) as pool:
            headers = [(b"x-request-id", b"same")]
            replies = list(pool.map(lambda _: self.ask(served, headers, n=2, seed=1), range(8)))
        assert {reply.status_code for reply in replies} == {200}
        assert {reply.json()["id"] for reply in replies} == {"cmpl-same"}
        served.assert_nothing_is_left()


def test_vllm_answers_to_the_headers_that_it_reads(served: Served) -> None:
    headers = {"endpoint-load-metrics-format": "text"}
    body = {"model": "tiny", "prompt": "Once", "max_tokens": 2}
    reply = served.http.post("/v1/completions", json=body, headers=headers)
    assert "endpoint-load-metrics" in reply.headers


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_a_tenants_salt_is_one_that_vllm_takes(served: Served, path: str) -> None:
    from serving.gateway.intake.json_body import with_fields
    from tests.serving.gateway.tenants.tenant import make_tenant

    prompt: dict[str, Any] = {
        "/v1/completions": {"prompt": "Once"},
        "/v1/responses": {"input": "Once"},
    }.get(path, CHAT)
    body = json.dumps({"model": "tiny", **prompt, "cache_salt": None}).encode()
    salted = with_fields(body, {"cache_salt": make_tenant().cache_salt("")})
    assert served.http.post(path, content=salted).status_code == 200


def test_the_engine_tells_how_large_its_vocabulary_is(served: Served) -> None:
    [info] = served.gateway.driver.engines.infos.values()
    assert info.vocab_size == 49152
    reply = served.ask({"prompt": "Once", "prompt_logprobs": -1})
    assert reply.json()["error"]["param"] == "prompt_logprobs"
