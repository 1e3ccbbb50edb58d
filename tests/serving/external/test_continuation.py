"""How replies go on, and which cannot."""

import json

import pytest

from serving.engine.external.continuation import (
    CHAT,
    COMPLETIONS,
    CannotGoOn,
    Continuation,
    Overlap,
    is_just_text,
)
from serving.engine.external.events import EventCutter, decode_event, is_empty, without_ids

BODY = {"messages": [], "stream": True, "model": "m"}


def event(text: str, ids: list[int] | None = None, finish: str | None = None, **head) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": finish}
    chunk = {"id": "one", "created": 5, "model": "m", **head}
    chunk["choices"] = [{**choice, "token_ids": ids}]
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode()


def begun(*events: bytes) -> Continuation:
    continuation = Continuation()
    for each in events or (event("", prompt_token_ids=[1, 2, 3]), event(" a", [10])):
        continuation.note(decode_event(each))
    return continuation


@pytest.mark.parametrize(
    ("fields", "how"),
    [
        ({}, "tokens"),
        ({"temperature": 0.7}, "tokens"),
        ({"temperature": 0}, "tokens"),
        ({"temperature": 0, "seed": 3}, "tokens"),
        ({"seed": 3}, "again"),
        ({"stop": ["x"]}, "no"),
        ({"stop": "x", "temperature": 0}, "again"),
        ({"presence_penalty": 0.5, "temperature": 0.0}, "again"),
        ({"repetition_penalty": 1.1}, "no"),
        ({"repetition_penalty": 1.0, "stop": [], "frequency_penalty": 0}, "tokens"),
        ({"n": 2, "temperature": 0}, "no"),
        ({"tools": [{}], "temperature": 0}, "no"),
        ({"logprobs": True, "temperature": 0}, "no"),
        ({"response_format": {"type": "json_object"}, "temperature": 0}, "no"),
        ({"response_format": {"type": "text"}}, "tokens"),
        ({"stream": False}, "no"),
    ],
)
def test_how(fields, how):
    body = {**BODY, **fields}
    assert begun().how(CHAT, body, "auto") == how
    assert begun().how(CHAT, body, "off") == "no"
    may = Continuation.may_go_on(CHAT, body, "auto", tells_ids=True)
    assert may == (how != "no")


def test_how_where_only_greedy_may():
    assert begun().how(CHAT, BODY, "greedy") == "no"
    assert begun().how(CHAT, {**BODY, "seed": 1}, "greedy") == "no"
    assert begun().how(CHAT, {**BODY, "temperature": 0}, "greedy") == "tokens"


def test_how_without_ids():
    continuation = begun(event(" a"))
    assert continuation.how(CHAT, BODY, "auto") == "no"
    assert continuation.how(CHAT, {**BODY, "temperature": 0}, "auto") == "again"
    assert not Continuation.may_go_on(CHAT, BODY, "auto", tells_ids=False)


def test_what_another_kind_of_engine_began_cannot_go_on():
    assert Continuation().how(CHAT, {**BODY, "temperature": 0}, "auto") == "no"


def test_more_than_text_cannot_go_on():
    reasoning = event("").replace(b'"content":""', b'"reasoning":"hm"')
    continuation = begun(event("", prompt_token_ids=[1]), reasoning)
    assert continuation.how(CHAT, {**BODY, "temperature": 0}, "auto") == "no"


@pytest.mark.parametrize(
    ("prompt", "is_text"),
    [("x", True), ([1, 2], True), (["x"], False), ([[1]], False), ([], False), (None, False)],
)
def test_completions_of_one_prompt(prompt, is_text):
    assert is_just_text(COMPLETIONS, {"prompt": prompt, "stream": True}) is is_text


def test_the_rest_is_asked_for_by_ids():
    continuation = begun(
        event("", prompt_token_ids=[1, 2, 3]), event(" a", [10]), event(" b", [11]), event("", [12])
    )
    continuation.cut_to_shown()  # of 12 the client has no text
    body = {**BODY, "max_completion_tokens": 9, "min_tokens": 4, "temperature": 0.5, "top_k": 3}
    rest = json.loads(continuation.body_for_rest(CHAT, body, 4096))
    assert rest == {
        "model": "m",
        "stream": True,
        "prompt": [1, 2, 3, 10, 11],
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_k": 3,
        "return_token_ids": True,
    }
    assert json.loads(continuation.body_for_rest(CHAT, BODY, 100))["max_tokens"] == 95
    assert json.loads(continuation.body_for_rest(COMPLETIONS, BODY, 100))["max_tokens"] == 14
    assert continuation.body_for_rest(CHAT, {**BODY, "max_tokens": 2}, 100) is None


def test_events_of_the_rest_look_like_those_before():
    continuation = begun()
    choice = {"index": 0, "text": " b", "logprobs": None, "finish_reason": None}
    choice |= {"stop_reason": None, "prompt_token_ids": [1, 2, 3, 10], "token_ids": [11]}
    theirs = {"id": "two", "object": "text_completion", "created": 9, "model": "m"}
    raw = b"data: " + json.dumps({**theirs, "choices": [choice]}).encode()
    shown = continuation.as_rest(raw, CHAT, is_completion=True, num_known=1)
    assert json.loads(without_ids(shown)[6:]) == {
        "id": "one",
        "object": "chat.completion.chunk",
        "created": 5,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "delta": {"content": " b"},
                "logprobs": None,
                "finish_reason": None,
                "token_ids": None,
            }
        ],
    }
    usage = {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10}
    raw = b"data: " + json.dumps({**theirs, "choices": [], "usage": usage}).encode()
    shown = json.loads(continuation.as_rest(raw, CHAT, is_completion=True, num_known=1)[6:])
    assert shown["usage"] == {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}


def test_what_comes_again_is_cut_off():
    overlap = Overlap(" a b c")
    assert overlap.cut(event("")) == b""
    assert overlap.cut(event(" a")) == b""
    assert overlap.cut(event(" b")) == b""
    shown = overlap.cut(event(" c d"))
    assert decode_event(shown).choices[0].content == " d"
    assert overlap.cut(event(" e")) == event(" e")


def test_what_comes_otherwise_is_refused():
    with pytest.raises(CannotGoOn, match="differs"):
        Overlap(" a b").cut(event(" a x"))
    with pytest.raises(CannotGoOn, match="shorter"):
        Overlap(" a b").cut(event(" a", finish="stop"))


def test_ids_are_taken_out_and_nothing_else():
    text = r'say \"token_ids\":[1,2] and "'
    raw = event(text, [1, 2], prompt_token_ids=[3])
    plain = event(text, None).replace(b'"model":"m",', b'"model":"m","prompt_token_ids":null,')
    assert without_ids(raw) == plain


def test_events_that_only_bear_ids_are_known():
    assert is_empty(decode_event(event("x", [1]).replace(b'{"content":"x"}', b"{}")))
    assert not is_empty(decode_event(event("", [1])))
    assert not is_empty(decode_event(event("x", [1], "stop").replace(b'{"content":"x"}', b"{}")))


def test_cutting():
    cutter = EventCutter()
    assert cutter.feed(b"data: a\n") == []
    assert cutter.feed(b"\ndata: b\r\n\r\ndata: c") == [b"data: a", b"data: b"]
    assert cutter.flush() == [b"data: c"]
    assert cutter.flush() == []
