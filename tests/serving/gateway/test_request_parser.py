"""What the gateway reads of a body."""

import msgspec
import pytest

from router.types import Usage
from serving.gateway.http.errors import ApiError
from serving.gateway.request_parser import RequestParser, prefix_hashes
from tests.support.fakes import INFO

ENGINES = {"r0": INFO}
EMBEDDER = {"r0": msgspec.structs.replace(INFO, tasks=("embed",))}
CHAT = "/v1/chat/completions"


def parse(path: str, body: bytes | dict, engines=ENGINES, parser=None):
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return (parser or RequestParser()).parse(path, raw, "id", engines, 100.0, 30.0)


def chat(**fields) -> dict:
    return {"model": "fake-model", "messages": [{"role": "user", "content": "hi"}], **fields}


def test_a_chat_request_is_sized_by_its_text():
    body = chat(messages=[{"role": "user", "content": "word " * 400}], max_tokens=7, n=2)
    request, num_text_bytes = parse(CHAT, body)
    assert request.num_prompt_tokens == pytest.approx(2000 / 4, rel=0.05)
    assert num_text_bytes > 2000
    assert (request.max_output_tokens, request.num_sequences) == (7, 2)
    assert (request.arrival_s, request.deadline_s) == (100.0, 130.0)


@pytest.mark.parametrize("text", [b"[1,2,3,4]", b"[ 1, 2, 3, 4 ]", b"[\n1,\n2,\n3,\n4\n]"])
def test_token_ids_are_counted_exactly(text):
    body = b'{"model": "fake-model", "prompt": ' + text + b"}"
    request, num_text_bytes = parse("/v1/completions", body)
    assert request.num_prompt_tokens == 4
    assert num_text_bytes == 0  # nothing to learn from: no text


def test_the_estimate_learns_from_real_counts():
    """A language with two tokens per byte is known for one after a few long prompts."""
    parser = RequestParser()
    for _ in range(50):
        parser.learn_tokens_per_byte(20_000, Usage(num_prompt_tokens=40_000))
    assert parser.tokens_per_byte == pytest.approx(2.0, rel=0.01)
    parser.learn_tokens_per_byte(1_000, None)  # refused by vLLM: nothing was counted
    assert parser.tokens_per_byte == pytest.approx(2.0, rel=0.01)


def test_an_estimate_never_exceeds_what_the_model_takes():
    body = chat(messages=[{"role": "user", "content": "x" * 1_000_000}])
    assert parse(CHAT, body)[0].num_prompt_tokens == INFO.max_model_len


def test_a_missing_model_is_the_served_one():
    body = chat()
    del body["model"]
    assert parse(CHAT, body)[0].model == "fake-model"


def test_numbers_in_strings_are_read_as_vllm_reads_them():
    assert parse(CHAT, chat(max_tokens="12"))[0].max_output_tokens == 12


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        (CHAT, b"{", 400, "not valid JSON"),
        (CHAT, b"", 400, "not valid JSON"),
        (CHAT, b"\xff\xfe", 400, "not valid JSON"),
        (CHAT, b"[]", 400, "Expected `object`"),
        (CHAT, {"model": "fake-model"}, 400, "messages"),
        (CHAT, chat(messages=[]), 400, "'messages' is missing or empty"),
        (CHAT, chat(messages="hi"), 400, "must be a list"),
        (CHAT, chat(model=["x"]), 400, "$.model"),
        (CHAT, chat(max_tokens="many"), 400, "$.max_tokens"),
        (CHAT, chat(model="other"), 404, "'other' does not exist"),
        ("/v1/completions", {"model": "fake-model"}, 400, "'prompt' is missing"),
        ("/v1/embeddings", {"model": "fake-model", "input": "x"}, 400, "does not support"),
    ],
)
def test_what_cannot_work_is_refused_with_its_reason(path, body, status, words):
    with pytest.raises(ApiError) as caught:
        parse(path, body)
    assert caught.value.status == status
    assert words in str(caught.value)


def test_an_embedding_model_takes_embeddings_and_no_chat():
    assert parse("/v1/embeddings", {"input": "x"}, EMBEDDER)[0].num_prompt_tokens >= 1
    with pytest.raises(ApiError, match="does not support"):
        parse(CHAT, chat(), EMBEDDER)


def test_before_any_engine_is_up_nothing_is_judged():
    """The request is held; whether its model exists will be known when engines are."""
    assert parse(CHAT, chat(model="later"), {})[0].model == "later"


class TestPrefixHashes:
    """Blocks of 256 bytes."""

    def test_equal_as_far_as_the_prompts_are(self):
        shared = b"x" * 512
        one = prefix_hashes("m", shared + b"a" * 300)
        other = prefix_hashes("m", shared + b"b" * 300)
        assert len(one) == len(other) == 3
        assert one[:2] == other[:2]
        assert one[2] != other[2]

    def test_a_block_is_known_by_all_before_it(self):
        repeated = prefix_hashes("m", b"x" * 2560)
        assert len(set(repeated)) == 10
        assert repeated[1] != prefix_hashes("m", b"y" * 256 + b"x" * 256)[1]
        assert repeated[0] != prefix_hashes("n", b"x" * 256)[0]  # another model's cache

    @pytest.mark.parametrize(
        ("num_bytes", "num_blocks"), [(0, 0), (255, 0), (256, 1), (10**6, 256)]
    )
    def test_whole_blocks_and_not_too_many(self, num_bytes, num_blocks):
        assert len(prefix_hashes("m", b"x" * num_bytes)) == num_blocks

    def test_only_where_wanted(self):
        body = msgspec.json.encode(chat(messages=[{"role": "user", "content": "word " * 400}]))
        parser, asked = RequestParser(), (CHAT, body, "id", ENGINES, 100.0, 30.0)
        assert parser.parse(*asked)[0].prefix_hashes == ()
        assert len(parser.parse(*asked, wants_prefix=True)[0].prefix_hashes) == 7

    def test_the_next_turn_of_a_conversation_matches_the_last(self):
        turn = [{"role": "user", "content": "word " * 400}]
        more = [*turn, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "go"}]
        first, second = (
            prefix_hashes("m", msgspec.json.encode(messages)) for messages in (turn, more)
        )
        assert second[: len(first)] == first
