"""Bodies as vLLM would read them."""

import contextlib
import json
import time
from typing import Any

import pytest

from serving.gateway.http.errors import ApiError
from serving.gateway.intake.json_body import ENDPOINTS, read_json_body, with_fields
from tests.serving.gateway.intake.asking import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, chat

MESSAGES = "/v1/messages"
BATCH = "/v1/chat/completions/batch"
TOKENS = "/inference/v1/generate"
NEEDED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    COMPLETIONS: {"prompt": "hi"},
    RESPONSES: {"input": "hi"},
    EMBEDDINGS: {"input": "hi"},
    MESSAGES: {"messages": [{"role": "user", "content": "hi"}], "model": "m", "max_tokens": 9},
    BATCH: {"messages": [[{"role": "user", "content": "hi"}]]},
    TOKENS: {"token_ids": [1], "sampling_params": {}},
    "/classify": {"input": "hi"},
    "/pooling": {"input": "hi"},
    "/score": {"text_1": "a", "text_2": "b"},
    "/rerank": {"query": "a", "documents": ["b"]},
    "/generative_scoring": {"query": "a", "items": ["b"], "label_token_ids": [1]},
    "/v1/systemone": {"state": "a", "questions": {}},
    "/v2/embed": {"texts": ["a"], "input_type": "x"},
}
# Read as another is (its other names), an upload, or of a package that is not installed here.
ELSEWHERE = {"/v1/score", "/v1/rerank", "/v2/rerank", "/cohere/v2/chat"} | {
    path for path, endpoint in ENDPOINTS.items() if endpoint.is_form
}


class TestEncodings:
    @pytest.mark.parametrize(
        "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
    )
    def test_all_that_json_may_come_in(self, encoding):
        said = chat(messages=[{"role": "user", "content": "é 漢 🙂"}], max_tokens=7)
        body = read_json_body(CHAT, json.dumps(said, ensure_ascii=False).encode(encoding))
        assert json.loads(body.data.decode()) == said
        assert body.fields.output_limit == ("max_tokens", 7)
        assert json.loads(body.prompts["messages"]) == said["messages"]

    @pytest.mark.parametrize(
        "data",
        [
            '{"model": "m"}'.encode("utf-16")[:-1],
            b'{"messages": [{"content": "\xff"}]}',  # where nobody looks
            b'{"messages": [{"content": "hi"}], "x": "\xc3"}',
        ],
    )
    def test_none_of_them(self, data):
        with pytest.raises(ApiError, match="UTF-8") as caught:
            read_json_body(CHAT, data)
        assert caught.value.status == 400

    @pytest.mark.parametrize(
        "text",
        [
            '{"messages": [{}], "max_tokens": 7, "top_p": NaN}',
            '{"messages": [{}], "max_tokens": 7, "top_p": -Infinity}',
            '{"messages": [{"content": "\\ud800"}], "max_tokens": 7}',
            '{"messages": [{}], "max_tokens": 7, "x": "\\ud800"}',
            '{"messages": [{}], "\\u006dax_tokens": 7}',
            '{"messages": [{}], "max_tokens": 9, "max_tokens": 7}',
            ' \n{"messages" : [{}] , "max_tokens" : 7 }\t',
        ],
    )
    def test_what_only_python_can_read(self, text):
        body = read_json_body(CHAT, text.encode())
        assert body.data == text.encode()  # vLLM has the last word
        assert body.fields.output_limit == ("max_tokens", 7)
        assert body.prompts["messages"].startswith(b"[{")

    def test_large_bodies_that_only_python_can_read_are_refused(self):
        """Nobody else would be answered while it reads."""
        text = b'{"prompt": [' + b"1," * 2**22 + b'1], "x": NaN}'
        begin_s = time.thread_time()
        with pytest.raises(ApiError, match="not valid JSON"):
            read_json_body(COMPLETIONS, text)
        assert time.thread_time() - begin_s < 0.3

    @pytest.mark.parametrize("name", ["n", "logprob_token_ids", "priority_class", "unknown"])
    @pytest.mark.parametrize("item", ["1,", "{},", "[],"])
    def test_a_field_of_megabytes_is_not_taken_apart(self, name, item):
        text = f'{{"prompt": "hi", "{name}": [{item * 2**21}1]}}'.encode()
        begin_s = time.perf_counter()
        refused = name in ("n", "logprob_token_ids")
        with pytest.raises(ApiError) if refused else contextlib.nullcontext():
            read_json_body(COMPLETIONS, text)
        assert time.perf_counter() - begin_s < 0.3


class TestWithFields:
    @pytest.mark.parametrize(
        "text",
        [
            '{"a":1}',
            '{"a":1 }\n',
            '{"a":{"b":"}"}}',
            '{"a":"}"}',
            '{"s":"theirs","a":1}',
            '{"a":1,"s":null}',
            '{"a":NaN}',
        ],
    )
    def test_they_are_there_and_win(self, text):
        added = {"s": 'ours "\\', "n": 3}
        joined = with_fields(text.encode(), added)
        assert json.loads(joined, parse_constant=str) == {
            **json.loads(text, parse_constant=str),
            **added,
        }

    def test_without_any_nothing_is_copied(self):
        data = b'{"a":1}'
        assert with_fields(data, {}) is data


# Values that some of pydantic's rules convert and some refuse.
VALUES: list[Any] = [
    *(True, False, None, 0, 1, 2, -1, 7, 0.0, 1.0, 7.0, 1.5, -0.0, 2**31, 2**63 - 1, -(2**63)),
    *("", "0", "1", "7", " 7 ", "+7", "-7", "7.0", "7.5", "1_000", "1e3", "0x10", "\u0667", "inf"),
    *("true", "TRUE", "yes", "Yes", "y", "on", "t", "no", "off", "f", "n", "maybe", "null"),
    *([], [1], ["1"], [True], [1.5], [None], {}, {"a": 1}, "x" * 100),
]
# What vLLM wants to have said, too.
ALONG: dict[str, dict[str, Any]] = {"logprob_token_ids": {"logprobs": 1}}
FIELDS = {
    CHAT: "model stream temperature seed n max_tokens max_completion_tokens min_tokens echo "
    "logprobs prompt_logprobs logprob_token_ids priority request_id top_k truncate_prompt_tokens",
    COMPLETIONS: "model stream temperature seed n max_tokens min_tokens echo logprob_token_ids "
    "priority request_id top_k truncate_prompt_tokens",
    RESPONSES: "model stream temperature seed max_output_tokens priority request_id top_k",
    EMBEDDINGS: "model priority request_id truncate_prompt_tokens cache_salt",
    MESSAGES: "max_tokens stream temperature top_k",
    BATCH: "model temperature seed max_tokens max_completion_tokens logprobs priority request_id "
    "top_k",
    TOKENS: "model stream priority request_id",
    **dict.fromkeys(
        ("/classify", "/pooling", "/score", "/rerank"),
        "model priority request_id truncate_prompt_tokens cache_salt",
    ),
    "/generative_scoring": "model priority request_id cache_salt",
    "/v1/systemone": "model priority request_id",
    "/v2/embed": "model priority",
}
# What is another thing there: a bound of the input.
OTHERS = {
    "/v2/embed": {"max_tokens"},
    "/v1/responses": {"metadata"},  # only Anthropic's tells a session
}


def test_each_endpoint_is_compared_with_vllms():
    assert FIELDS.keys() == NEEDED.keys() == ENDPOINTS.keys() - ELSEWHERE


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """vLLM's own models of the same bodies, by path."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.generate.generative_scoring.serving import GenerativeScoringRequest
    from vllm.entrypoints.generate.structured_decisions.protocol import StructuredDecisionRequest
    from vllm.entrypoints.openai.chat_completion.protocol import (
        BatchChatCompletionRequest,
        ChatCompletionRequest,
    )
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.pooling.classify.protocol import ClassificationCompletionRequest
    from vllm.entrypoints.pooling.embed.protocol import (
        CohereEmbedRequest,
        EmbeddingCompletionRequest,
    )
    from vllm.entrypoints.pooling.pooling.protocol import PoolingCompletionRequest
    from vllm.entrypoints.pooling.scoring.protocol import RerankRequest, ScoreTextRequest
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest

    return {
        CHAT: ChatCompletionRequest,
        COMPLETIONS: CompletionRequest,
        RESPONSES: ResponsesRequest,
        EMBEDDINGS: EmbeddingCompletionRequest,
        MESSAGES: AnthropicMessagesRequest,
        BATCH: BatchChatCompletionRequest,
        TOKENS: GenerateRequest,
        "/classify": ClassificationCompletionRequest,
        "/pooling": PoolingCompletionRequest,
        "/score": ScoreTextRequest,
        "/rerank": RerankRequest,
        "/generative_scoring": GenerativeScoringRequest,
        "/v1/systemone": StructuredDecisionRequest,
        "/v2/embed": CohereEmbedRequest,
    }


def theirs(model: Any, said: dict, name: str) -> Any:
    """Return what vLLM takes a field for; an ellipsis if it refuses it."""
    from vllm.exceptions import VLLMValidationError

    try:
        value = getattr(model.model_validate(said), name)
    except (ValueError, VLLMValidationError):
        return ...
    return type(value), value


def ours(path: str, said: dict, name: str) -> Any:
    try:
        fields = read_json_body(path, json.dumps(said).encode()).fields
    except ApiError:
        return ...
    value = getattr(fields, name)
    return type(value), value


@pytest.mark.engine
@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", FIELDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestAgainstVllm:
    def test_each_field_is_read_alike(self, models, path):
        """Where vLLM takes a value, we take it for the same."""
        differences, num_taken = [], 0
        for name in FIELDS[path].split():
            for value in VALUES:
                said = {**NEEDED[path], **ALONG.get(name, {}), name: value}
                taken = theirs(models[path], said, name)
                num_taken += taken is not ...
                if taken is not ... and ours(path, said, name) != taken:
                    differences.append((name, value, taken, ours(path, said, name)))
        assert differences == []
        assert num_taken > 10 * len(FIELDS[path].split())

    def test_what_vllm_refuses_by_its_type_we_do(self, models, path):
        for name in FIELDS[path].split():
            for value in ({"a": 1}, [None]):
                said = {**NEEDED[path], name: value}
                assert theirs(models[path], said, name) is ours(path, said, name) is ..., name

    def test_each_endpoint_reads_what_it_has(self, models, path):
        """A field that is read at one endpoint is read at all of which vLLM knows it, too."""
        read = {name for each in ENDPOINTS.values() for name in each.fields.model_fields}
        unread = set(models[path].model_fields) - set(ENDPOINTS[path].fields.model_fields)
        assert read & unread - OTHERS.get(path, set()) - {"sampling_params"} == set()
