"""What the gateway makes of a request."""

import msgspec
import pytest

from router import RequestClass
from serving.config import TenantConfig
from serving.gateway.http.errors import ApiError
from serving.gateway.intake.request_headers import RequestHeaders, read_headers
from tests.serving.gateway.intake.asking import (
    CHAT,
    COMPLETIONS,
    EMBEDDER,
    EMBEDDINGS,
    RESPONSES,
    SMALL,
    ask,
    chat,
    completion,
    make_parser,
)
from tests.serving.gateway.tenants.tenant import make_tenant


def test_a_chat_request_is_sized_by_its_text():
    body = chat(messages=[{"role": "user", "content": "word " * 400}], max_tokens=7, n=2)
    asked = ask(CHAT, body)
    request = asked.request
    assert request.num_prompt_tokens == pytest.approx(2000 / 4, rel=0.05)
    assert asked.num_text_bytes > 2000
    assert (request.max_output_tokens, request.num_sequences) == (7, 2)
    assert (request.arrival_s, request.deadline_s) == (100.0, 400.0)
    assert request.num_bytes == len(asked.body)


@pytest.mark.parametrize(
    ("path", "fields", "limit"),
    [
        (CHAT, {}, None),
        (CHAT, {"max_tokens": 5}, 5),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 9}, 9),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": None}, 5),
        (CHAT, {"max_tokens": "12"}, 12),
        (COMPLETIONS, {}, 16),  # vLLM's and OpenAI's default
        (COMPLETIONS, {"max_tokens": None}, 16),
        (COMPLETIONS, {"max_tokens": 5, "max_completion_tokens": 9}, 5),
        (COMPLETIONS, {"max_tokens": 0, "echo": True}, 1),
        (RESPONSES, {"max_output_tokens": 5}, 5),
        (RESPONSES, {"max_tokens": 5}, None),
        (EMBEDDINGS, {"max_tokens": 5}, 0),
    ],
)
def test_the_limit_of_tokens_is_the_one_that_vllm_goes_by(path, fields, limit):
    prompt = {CHAT: "messages", COMPLETIONS: "prompt"}.get(path, "input")
    text = [{"role": "user", "content": "hi"}] if path == CHAT else "hi"
    assert ask(path, {prompt: text, **fields}).request.max_output_tokens == limit


def test_an_estimate_never_exceeds_what_the_model_takes():
    body = chat(messages=[{"role": "user", "content": "x" * 1_000_000}])
    asked = ask(CHAT, body)
    assert asked.request.num_prompt_tokens == SMALL.max_model_len
    assert asked.num_text_bytes == 0  # vLLM will not have read it
    body = completion("x" * 1_000, truncate_prompt_tokens=10)
    assert ask(COMPLETIONS, body).request.num_prompt_tokens == 10


def test_class_by_body_then_header_then_tenant():
    tenant = make_tenant(config=TenantConfig(default_class=RequestClass.BATCH))
    by_header = RequestHeaders([], request_class=RequestClass.INTERACTIVE)

    def class_of(headers=None, tenant=None, **fields) -> RequestClass:
        return ask(CHAT, chat(**fields), headers=headers, tenant=tenant).request.priority_class

    assert class_of(by_header, tenant, priority_class="standard") is RequestClass.STANDARD
    assert class_of(by_header, tenant) is RequestClass.INTERACTIVE
    assert class_of(None, tenant) is RequestClass.BATCH
    assert class_of() is RequestClass.STANDARD
    # To vLLM a field that it does not know: nothing to refuse.
    for junk in ("royal", 7, None, ["batch"], {"a": 1}, "x" * 100_000):
        assert class_of(priority_class=junk) is RequestClass.STANDARD


@pytest.mark.parametrize(
    ("path", "body", "status", "words", "param"),
    [
        (CHAT, b"{", 400, "not valid JSON", "body.1"),
        (CHAT, b"", 400, "it is empty", "body"),
        (CHAT, b"\xff\xfe", 400, "not valid JSON", "body.0"),
        (CHAT, b'{"model": "\xff"}', 400, "not valid JSON", "body"),
        (CHAT, b'{"messages":' + b"[" * 2000 + b"]" * 2000 + b"}", 400, "too deeply", "body"),
        (CHAT, b"[]", 400, "not an object", "body"),
        (CHAT, b"7", 400, "not an object", "body"),
        (CHAT, {"model": "fake-model"}, 400, "messages", "body.messages"),
        (CHAT, chat(messages=[]), 400, "'messages' is missing or empty", "body.messages"),
        (CHAT, chat(messages="hi"), 400, "must be a list", "body.messages"),
        (CHAT, chat(model=["x"]), 400, "valid string", "body.model"),
        (CHAT, chat(max_tokens="many"), 400, "valid integer", "body.max_tokens"),
        (CHAT, chat(stream="maybe"), 400, "valid boolean", "body.stream"),
        (CHAT, chat(model="other"), 404, "`other` does not exist", "model"),
        (COMPLETIONS, {"model": "fake-model"}, 400, "Either prompt or prompt_embeds", "prompt"),
        (CHAT, chat(cache_salt="a/b"), 400, "cache_salt", "body.cache_salt"),
        (CHAT, chat(cache_salt=""), 400, "cache_salt", "body.cache_salt"),
    ],
)
def test_what_cannot_work_is_refused_with_its_reason(path, body, status, words, param):
    with pytest.raises(ApiError) as caught:
        ask(path, body)
    error = msgspec.json.decode(caught.value.body())["error"]
    assert caught.value.status == error["code"] == status
    assert words in error["message"]
    assert error["param"] == param


def test_fields_that_cannot_be_read_are_refused_in_vllms_form():
    """Its own tests look for pydantic's kind of error in the message."""
    from vllm.entrypoints.serve.exception_handling.handlers.validation import _format_error

    too_large = {
        "type": "less_than_equal",
        "loc": ("body", "seed"),
        "msg": f"Input should be less than or equal to {2**63 - 1}",
        "input": 2**63,
        "ctx": {"le": 2**63 - 1},
    }
    with pytest.raises(ApiError) as caught:
        ask(CHAT, chat(seed=2**63))
    assert str(caught.value) == f"1 validation error:\n  {_format_error(too_large)}"
    with pytest.raises(ApiError) as caught:
        ask(CHAT, chat(seed="x" * 1000, n="y"))
    head, *lines = str(caught.value).split("\n")
    assert head == "2 validation errors:"
    assert all("'int_parsing'" in line for line in lines)
    assert max(map(len, lines)) < 500


def test_an_embedding_model_takes_embeddings_and_no_chat():
    parser = make_parser(EMBEDDER)
    assert ask(EMBEDDINGS, {"input": "x"}, parser).request.num_prompt_tokens >= 1
    messages = [{"role": "user", "content": "word " * 400}]
    asked = ask(EMBEDDINGS, {"messages": messages}, parser)
    assert asked.request.num_prompt_tokens == pytest.approx(500, rel=0.1)
    with pytest.raises(ApiError, match="does not support"):
        ask(CHAT, chat(), parser)
    with pytest.raises(ApiError, match="does not support"):
        ask(EMBEDDINGS, {"input": "x"}, make_parser(SMALL))


class TestTenant:
    def test_a_request_is_its_tenants(self):
        tenant = make_tenant("acme", TenantConfig(weight=3.0))
        request = ask(CHAT, chat(), tenant=tenant).request
        assert (request.tenant, request.weight) == ("acme", 3.0)
        request = ask(CHAT, chat()).request
        assert (request.tenant, request.weight) == ("", 1.0)

    def test_prefixes_are_each_ones_own(self):
        """In the engine by a salt, in our own guess by other hashes."""
        one, two = make_tenant("one"), make_tenant("two")
        body = chat(messages=[{"role": "user", "content": "word " * 400}])

        def salt_and_hashes(tenant, **fields):
            asked = ask(CHAT, {**body, **fields}, tenant=tenant, wants_prefix=True)
            return asked.added.get("cache_salt"), asked.request.prefix_hashes[0]

        asked = [
            salt_and_hashes(one),
            salt_and_hashes(two),
            salt_and_hashes(one, cache_salt="own"),
            salt_and_hashes(two, cache_salt="own"),
            salt_and_hashes(one, cache_salt="other"),
        ]
        salts, hashes = zip(*asked, strict=True)
        assert len(set(salts)) == len(set(hashes)) == 5
        assert salt_and_hashes(one) == asked[0]
        # Nobody can ask in another's name: what is sent is never the client's own text.
        assert salt_and_hashes(two, cache_salt=salts[0])[0] not in salts
        assert all(len(salt) <= 128 and salt.isalnum() for salt in salts)  # vLLM takes no more

    def test_without_tenants_or_where_they_share_the_salt_is_the_clients(self):
        body = chat(cache_salt="own")
        assert ask(CHAT, body).added == {}
        assert ask(CHAT, body, tenant=make_tenant(shares_prefixes=True)).added == {}

    def test_only_models_that_it_may_use_are_named(self):
        """One that it may not use is refused in the very words of one that does not exist."""
        tenant = make_tenant(config=TenantConfig(models=frozenset({"theirs"})))
        infos = [
            msgspec.structs.replace(SMALL, model=name, aliases=(f"{name}-lora",))
            for name in ("theirs", "secret")
        ]
        parser = make_parser(*infos)
        texts = []
        for name in ("secret", "secret-lora", "nowhere"):
            with pytest.raises(ApiError) as caught:
                ask(CHAT, chat(model=name), parser, tenant=tenant)
            texts.append(caught.value.body().replace(name.encode(), b"NAME"))
        assert len(set(texts)) == 1
        assert b"theirs" in texts[0]
        assert b"secret" not in texts[0]
        # The model that it gets by default is one that it may use.
        assert ask(CHAT, chat(model=None), parser, tenant=tenant).request.model == "theirs"

    def test_classes_that_it_may_not_use(self):
        tenant = make_tenant(config=TenantConfig(classes=(RequestClass.BATCH,)))
        assert ask(CHAT, chat(), tenant=tenant).request.priority_class is RequestClass.BATCH
        with pytest.raises(ApiError) as caught:
            ask(CHAT, chat(priority_class="interactive"), tenant=tenant)
        assert caught.value.status == 403


class TestPrefix:
    def test_only_where_wanted(self):
        body = chat(messages=[{"role": "user", "content": "word " * 400}])
        assert ask(CHAT, body).request.prefix_hashes == ()
        assert len(ask(CHAT, body, wants_prefix=True).request.prefix_hashes) == 7

    def test_what_a_chat_continues(self):
        turn = [{"role": "user", "content": "hi"}]
        more = [*turn, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "go"}]
        first, second = (
            ask(CHAT, chat(messages=each), wants_prefix=True).request for each in (turn, more)
        )
        assert second.answered_hash == first.end_hash != 0
        assert 0.0 < second.answered_share < 1.0

    def test_sessions_by_what_clients_call_them(self):
        def session(header=b"", **fields):
            headers = read_headers([(b"x-session-id", header)] if header else [])
            return ask(CHAT, chat(**fields), headers=headers).request.session

        assert session() == session(user="everybody") == 0
        assert session(b"one") == session(session_id="one") == session(prompt_cache_key="one") != 0
        assert session(b"one", session_id="two") == session(session_id="two") != session(b"one")
        assert session(session_id=7) == 0  # vLLM refuses it

    def test_a_message_of_anthropics_is_known_by_its_tools_and_its_session(self):
        def request(question, **fields):
            body = {"max_tokens": 1, "messages": [{"role": "user", "content": question}]}
            tools = [{"name": "read", "description": "word " * 200}]
            body |= {"model": SMALL.model, "system": "be brief", "tools": tools, **fields}
            return ask("/v1/messages", body, wants_prefix=True).request

        one, other = request("a" * 300), request("b" * 300)
        assert one.prefix_hashes[:4] == other.prefix_hashes[:4]
        assert one.prefix_hashes[-1] != other.prefix_hashes[-1]
        assert request("a", metadata={"user_id": "u_session_1"}).session != 0
        assert request("a", metadata={"user_id": 7}).session == request("a").session == 0


def test_each_model_has_its_own_tokens_per_byte():
    """One that has answered nothing yet is taken to be like the others together."""
    other = msgspec.structs.replace(SMALL, model="other")
    third = msgspec.structs.replace(SMALL, model="third")
    parser = make_parser(SMALL, other, third)

    def size(model: str) -> int:
        body = {"model": model, "prompt": "word " * 200}
        return ask(COMPLETIONS, body, parser).request.num_prompt_tokens

    before = size("fake-model")
    assert size("other") == before
    for _ in range(100):
        parser.learn_tokens("fake-model", 1000, 500)
        parser.learn_tokens("other", 1000, 100)
    assert size("fake-model") > 1.8 * before
    assert size("other") < 0.5 * before
    assert size("other") < size("third") < size("fake-model")
