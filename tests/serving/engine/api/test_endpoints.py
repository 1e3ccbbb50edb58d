"""vLLM's own endpoints through a gateway, with a real engine of the tiny model."""

import json
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import anthropic
import openai
import pytest

from serving.config import ConfigError
from serving.engine.vllm.engine import routes_of, vllm_arguments
from serving.gateway.http.endpoints.table import RULES
from tests.serving.engine.conftest import Served

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

QUESTION = [{"role": "user", "content": "Once upon a time"}]


@pytest.fixture
def claude(served: Served) -> Iterator[anthropic.Anthropic]:
    url = str(served.http.base_url)
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def storing(served: Served, monkeypatch: pytest.MonkeyPatch) -> openai.OpenAI:
    """A client of an engine that keeps responses, as with VLLM_ENABLE_RESPONSES_API_STORE."""
    serving = served.engine.app.state.openai_serving_responses  # type: ignore[attr-defined]
    monkeypatch.setattr(serving, "enable_store", True)
    return openai.OpenAI(base_url=f"{served.http.base_url}/v1", api_key="none", max_retries=0)


def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    return value


def test_the_engine_tells_what_it_has(served: Served) -> None:
    routes = served.engine.info.routes
    assert routes == routes_of(served.engine.app)
    known = {f"{rule.method} {rule.path}" for rule in RULES}
    assert set(routes) - known == set()
    assert {"POST /v1/messages", "GET /version", "POST /tokenize"} <= set(routes)


class TestMessages:
    ASKED: ClassVar[dict[str, Any]] = {"model": "tiny", "messages": QUESTION, "max_tokens": 12}

    def test_whole_and_streamed_say_the_same(self, claude: anthropic.Anthropic) -> None:
        whole = claude.messages.create(
            **self.ASKED, extra_body={"temperature": 0}, system="Tell a story."
        )
        assert whole.type == "message"
        assert whole.usage.output_tokens == 12
        assert whole.stop_reason == "max_tokens"
        with claude.messages.stream(
            **self.ASKED, extra_body={"temperature": 0}, system="Tell a story."
        ) as stream:
            kinds = [event.type for event in stream if event.type != "text"]
            last = stream.get_final_message()
        assert kinds[0] == "message_start"
        assert kinds[-1] == "message_stop"
        assert last.content[0].text == whole.content[0].text
        assert last.usage.output_tokens == 12

    def test_tokens_are_counted(self, claude: anthropic.Anthropic) -> None:
        counted = claude.messages.count_tokens(model="tiny", messages=QUESTION)
        used = claude.messages.create(**self.ASKED).usage
        assert counted.input_tokens == used.input_tokens

    def test_errors_are_anthropics(self, served: Served, claude: anthropic.Anthropic) -> None:
        with pytest.raises(anthropic.NotFoundError, match="gpt-9") as missing:
            claude.messages.create(**{**self.ASKED, "model": "gpt-9"})
        assert missing.value.body["error"]["type"] == "not_found_error"
        with pytest.raises(anthropic.BadRequestError, match="max_model_len") as wrong:
            claude.messages.create(**{**self.ASKED, "max_tokens": 5000})
        assert wrong.value.body["error"]["type"] == "invalid_request_error"
        # What vLLM itself finds wrong, it says in OpenAI's form.
        reply = served.http.post("/v1/messages", json={**self.ASKED, "stop_sequences": 7})
        assert reply.status_code == 400
        assert reply.json()["type"] == "error"
        assert "stop_sequences" in reply.json()["error"]["message"]
        # Of which vLLM sees nothing.
        reply = served.http.post("/v1/messages", content=b"{")
        assert reply.json()["error"]["type"] == "invalid_request_error"


class TestToldByOne:
    def test_tokens_there_and_back(self, served: Served) -> None:
        said = {"model": "tiny", "prompt": "Once upon a time"}
        told = served.http.post("/tokenize", json=said)
        assert told.status_code == 200
        tokens = told.json()["tokens"]
        again = served.http.post("/detokenize", json={"model": "tiny", "tokens": tokens})
        assert again.json()["prompt"] == said["prompt"]

    def test_the_version(self, served: Served) -> None:
        assert served.engine.info.engine == f"vllm {served.http.get('/version').json()['version']}"

    def test_another_model_is_not_found(self, served: Served) -> None:
        reply = served.http.post("/tokenize", json={"model": "gpt-9", "prompt": "hi"})
        assert reply.status_code == 404
        assert reply.json()["error"]["param"] == "model"

    def test_nothing_is_booked(self, served: Served) -> None:
        before = served.gateway.state().outcomes
        served.http.post("/tokenize", json={"model": "tiny", "prompt": "hi"})
        assert served.gateway.state().outcomes == before
        assert not served.server.accountings


class TestComputed:
    def test_conversations_in_one_request(self, served: Served) -> None:
        body = {"model": "tiny", "messages": [QUESTION, QUESTION], "max_tokens": 4}
        reply = served.http.post("/v1/chat/completions/batch", json=body)
        assert reply.status_code == 200, reply.text
        assert [choice["index"] for choice in reply.json()["choices"]] == [0, 1]

    def test_generative_scores(self, served: Served) -> None:
        body = {"model": "tiny", "query": "a", "items": ["b", "c"], "label_token_ids": [100, 200]}
        reply = served.http.post("/generative_scoring", json=body)
        assert reply.status_code == 200, reply.text
        assert len(reply.json()["data"]) == 2

    def test_what_sagemaker_invokes(self, served: Served) -> None:
        body = {"model": "tiny", "max_tokens": 4}
        chat = served.http.post("/invocations", json={**body, "messages": QUESTION})
        assert chat.json()["object"] == "chat.completion"
        completion = served.http.post("/invocations", json={**body, "prompt": "hi"})
        assert completion.json()["object"] == "text_completion"

    def test_what_this_model_does_not_do(self, served: Served) -> None:
        reply = served.http.post("/v1/rerank", json={"query": "a", "documents": ["b"]})
        assert reply.status_code == 400
        assert "do not have this endpoint" in reply.json()["error"]["message"]


class TestKeptResponses:
    ASKED: ClassVar[dict[str, Any]] = {
        "model": "tiny",
        "input": "Once upon",
        "max_output_tokens": 8,
    }

    def test_what_is_kept_can_be_gone_on_from(self, storing: openai.OpenAI) -> None:
        first = storing.responses.create(**self.ASKED)
        assert storing.responses.retrieve(first.id).output == first.output
        second = storing.responses.create(**self.ASKED, previous_response_id=first.id)
        assert second.previous_response_id == first.id
        assert second.usage is not None
        assert first.usage is not None
        assert second.usage.input_tokens > first.usage.input_tokens
        with storing.responses.stream(**self.ASKED, previous_response_id=second.id) as stream:
            third = stream.get_final_response()
        assert storing.responses.retrieve(third.id).id == third.id

    def test_what_is_lost_is_said_to_be(self, storing: openai.OpenAI) -> None:
        for ask in (
            lambda: storing.responses.retrieve("resp_none"),
            lambda: storing.responses.cancel("resp_none"),
            lambda: storing.responses.create(**self.ASKED, previous_response_id="resp_none"),
        ):
            with pytest.raises(openai.NotFoundError, match="No engine keeps it"):
                ask()

    def test_a_response_in_the_background_is_carried_through(
        self, served: Served, storing: openai.OpenAI
    ) -> None:
        """The call that began it is over long before: nothing is to be aborted with it."""
        asked = {**self.ASKED, "max_output_tokens": 200, "extra_body": {"ignore_eos": True}}
        queued = storing.responses.create(**asked, background=True)
        assert queued.status == "queued"
        assert served.engine._llm.output_processor.request_states or queued
        done = until(
            lambda: (
                found
                if (found := storing.responses.retrieve(queued.id)).status != "queued"
                else None
            )
        )
        assert done.status in ("completed", "incomplete")
        assert done.usage.output_tokens == 200
        endless = storing.responses.create(**{**asked, "max_output_tokens": 900}, background=True)
        assert storing.responses.cancel(endless.id).status == "cancelled"
        until(lambda: not served.engine._llm.output_processor.request_states)

    def test_a_background_stream_is_not_held_back(self, storing: openai.OpenAI) -> None:
        events = list(storing.responses.create(**self.ASKED, background=True, stream=True))
        assert events[0].type == "response.created"
        assert events[-1].type == "response.completed"

    def test_the_oldest_are_forgotten(
        self, served: Served, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("serving.engine.vllm.patches._MAX_RESPONSES", 3)
        serving = served.engine.app.state.openai_serving_responses  # type: ignore[attr-defined]
        store = type(serving.response_store)()
        for number in range(5):
            store[str(number)] = number
        assert list(store) == ["2", "3", "4"]


def lora_modules(modules: Any) -> list[Any]:
    plan: Any = SimpleNamespace(
        device="cpu",
        engine_args={"lora_modules": modules},
        model="m",
        served_model_name="m",
        aliases=(),
    )
    return vllm_arguments(plan).lora_modules


@pytest.mark.parametrize(
    "modules",
    [
        [{"name": "sql", "path": "/loras/sql"}, {"name": "law", "path": "/loras/law"}],
        ["sql=/loras/sql", "law=/loras/law"],
    ],
)
def test_adapters_are_taken_however_they_are_written(modules: list) -> None:
    found = lora_modules(modules)
    assert [(each.name, each.path) for each in found] == [
        ("sql", "/loras/sql"),
        ("law", "/loras/law"),
    ]


@pytest.mark.parametrize("modules", [["sql"], [{"nam": "sql"}], [7], 7])
def test_adapters_that_are_none_are_refused(modules: Any) -> None:
    with pytest.raises(ConfigError, match=r"engine\.args\.lora_modules"):
        lora_modules(modules)


def test_what_a_reply_is_told_beside_vllms_own_headers(served: Served) -> None:
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 2}
    reply = served.http.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
    assert reply.headers["x-request-id"] == "mine"
    assert reply.headers["x-headway-engine"] == "r0"
    assert int(reply.headers["x-headway-held-ms"]) >= 0
    told = served.http.get("/version", headers={"x-request-id": "mine"})
    assert told.headers.get_list("x-request-id") == ["mine"]
    whole = served.ask_engine(json.dumps(body).encode())
    assert reply.headers["content-type"] == whole.headers["content-type"]
