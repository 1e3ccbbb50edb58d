"""A grammar is compiled in a sandbox before the engine core, and others, suffer from it."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from serving.cluster.engine_watch import anonymous_bytes
from serving.config import EngineConfig
from serving.engine.vllm.grammar.grammars import MAX_GRAMMAR_CHARS, is_small
from tests.serving.engine.conftest import Served

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

MIB = 2**20


def nested(depth: int) -> dict:
    """A schema that is twice as large with each level."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"anyOf": [schema, {"type": "array", "items": schema}]}
    return schema


NAMES = {f"p{number}": {} for number in range(200)}
MANY = {f"property_{number}": {"type": "string"} for number in range(2000)}
# What eats up memory or time in xgrammar or in llguidance, for some few characters.
TOO_MUCH: dict[str, dict[str, Any]] = {
    "a billion items": {"json": {"type": "array", "minItems": 10**9}},
    "at most a billion": {
        "json": {
            "type": "array",
            "maxItems": 10**9,
            "items": {"type": "integer", "multipleOf": 2},
        }
    },
    "half of 200 properties": {
        "json": {"type": "object", "properties": NAMES, "maxProperties": 100}
    },
    "a tree of alternatives": {"json": nested(12)},
    "two thousand properties": {"json": {"type": "object", "properties": MANY}},
}
# What vLLM lets through, for its other compiler can do it, and what then fails in its core: a 500.
NO_GRAMMARS = {
    "no kind of items": {"json": {"type": "array", "minItems": 1}},
    "no kind of items, and a pattern": {
        "json": {
            "type": "object",
            "properties": {"a": {"type": "array", "minItems": 2}, "b": {"pattern": "x"}},
        }
    },
}
GOOD: dict[str, dict[str, Any]] = {
    "any JSON": {"json_object": True},
    "a choice": {"choice": ["yes", "no"]},
    "a choice of many": {"choice": [f"choice {number}" for number in range(300)]},
    "a pattern": {"regex": "(yes|no)( really){2}"},
    "a grammar": {"grammar": 'root ::= "yes" | "no"'},
    "a schema": {"json": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    "a pattern in a schema": {"json": {"type": "string", "pattern": "^(yes|no)$"}},
    "what xgrammar does not know": {"json": {"type": "integer", "multipleOf": 7, "maximum": 70}},
}


def ask(served: Served, outputs: dict[str, Any], **more: Any) -> Any:
    return served.ask({"prompt": "Once", "structured_outputs": outputs, **more})


@pytest.mark.parametrize("name", GOOD)
def test_a_grammar_is_followed(served: Served, name: str) -> None:
    reply = ask(served, GOOD[name], max_tokens=30)
    assert reply.status_code == 200, reply.text
    text = reply.json()["choices"][0]["text"]
    if "choice" in GOOD[name]:
        assert text in GOOD[name]["choice"]
    elif name in ("a grammar", "a pattern in a schema"):
        assert text.strip('"') in ("yes", "no")
    elif "regex" in GOOD[name]:
        assert text in ("yes really really", "no really really")
    served.assert_nothing_is_left()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_grammar_that_is_too_much(served: Served, name: str, stream: bool) -> None:
    """Refused, while the engine serves others and does not grow."""
    pids = served.engine.lifeline.pid, served.pid
    before = [anonymous_bytes(pid) for pid in pids]
    with ThreadPoolExecutor() as pool:
        poison = pool.submit(ask, served, TOO_MUCH[name], stream=stream)
        slowest_s = 0.0
        while not poison.done():
            begun_s = time.monotonic()
            assert served.ask({"prompt": "It was"}).status_code == 200
            slowest_s = max(slowest_s, time.monotonic() - begun_s)
            time.sleep(0.05)
    reply = poison.result()
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == ("BadRequestError", 400)
    assert "engine.grammar_timeout_s" in error["message"] or (
        "engine.grammar_max_bytes" in error["message"]
    )
    assert slowest_s < 5.0  # with compilers on all cores
    growth = [anonymous_bytes(pid) - was for pid, was in zip(pids, before, strict=True)]
    assert max(growth) < 32 * MIB
    served.assert_nothing_is_left()


def test_a_verdict_is_kept(served: Served) -> None:
    poison = TOO_MUCH["a billion items"]
    ask(served, poison)
    begun_s = time.monotonic()
    assert ask(served, poison).status_code == 400
    assert time.monotonic() - begun_s < 0.5


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", NO_GRAMMARS)
def test_what_the_core_could_not_compile(served: Served, name: str, stream: bool) -> None:
    reply = ask(served, NO_GRAMMARS[name], stream=stream)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]
    served.assert_nothing_is_left()


# By name: whether that shows at once, so that the engine never has it.
NOWHERE: dict[str, tuple[dict[str, Any], bool]] = {
    "left recursion": ({"grammar": 'root ::= root "a"'}, True),
    "a reference to itself": ({"json": {"$ref": "#"}}, True),
    "left recursion behind a letter": ({"grammar": 'root ::= "a" b\nb ::= b "x"'}, False),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", NOWHERE)
def test_a_grammar_that_leads_nowhere(served: Served, name: str, stream: bool) -> None:
    outputs, shows_at_once = NOWHERE[name]
    reply = ask(served, outputs, stream=stream, max_tokens=30)
    text = reply.text
    if reply.status_code == 200:  # it had begun by then
        assert stream
        assert not shows_at_once
        assert '"code": 400' in text
    else:
        assert reply.status_code == 400
    assert "allow" in text
    served.assert_nothing_is_left()


@pytest.mark.parametrize(
    "outputs",
    [
        {"choice": ["x" * MAX_GRAMMAR_CHARS]},
        {"structural_tag": json.dumps({"type": "structural_tag", "a": "x" * MAX_GRAMMAR_CHARS})},
        {"json": {"description": "x" * MAX_GRAMMAR_CHARS}},
    ],
)
def test_a_grammar_without_end(served: Served, outputs: dict[str, Any]) -> None:
    reply = ask(served, outputs)
    assert reply.status_code == 400


def test_a_verdict_stands_for_vllms_own_checks(served: Served, monkeypatch) -> None:
    """These would take the event loop as long as they took the sandbox."""
    from vllm.v1.structured_output import backend_xgrammar

    outputs = {"regex": "(one|two|three)!"}
    assert ask(served, outputs).status_code == 200

    def validate(sampling_params: Any) -> None:
        raise AssertionError("on the event loop")

    monkeypatch.setattr(backend_xgrammar, "validate_xgrammar_grammar", validate)
    reply = ask(served, outputs)
    assert reply.json()["choices"][0]["text"] in ("one!", "two!", "three!")


def test_a_sandbox_that_ends_is_started_anew(served: Served) -> None:
    sandbox = served.engine._grammars._sandbox
    assert ask(served, {"regex": "a first one"}).status_code == 200
    sandbox._process.kill()
    sandbox._process.wait()
    assert ask(served, {"regex": "another one"}).status_code in (200, 503)
    assert ask(served, {"regex": "one more"}).json()["choices"][0]["text"] == "one more"


def test_the_same_grammar_is_examined_once(served: Served, monkeypatch) -> None:
    sandbox = served.engine._grammars._sandbox
    examine, jobs = sandbox.examine, []

    async def count(fields: dict[str, Any], backend: str) -> Any:
        jobs.append(fields)
        await asyncio.sleep(0.3)
        return await examine(fields, backend)

    monkeypatch.setattr(sandbox, "examine", count)
    outputs = {"regex": "asked for by four"}
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: ask(served, outputs), range(4)))
    assert [reply.status_code for reply in replies] == [200] * 4
    assert jobs == [{"regex": "asked for by four"}]


@pytest.mark.parametrize("outputs", [{"choice": ["yes", "no"]}, {"json": {"type": "boolean"}}])
def test_what_is_small_needs_no_sandbox(served: Served, monkeypatch, outputs: dict) -> None:
    """For several prompts as well, though vLLM writes into what it checks."""

    async def examine(fields: dict[str, Any], backend: str) -> Any:
        raise AssertionError("to the sandbox")

    monkeypatch.setattr(served.engine._grammars._sandbox, "examine", examine)
    reply = ask(served, outputs, prompt=["Once", "It was"])
    assert reply.status_code == 200
    words = {choice["text"].strip() for choice in reply.json()["choices"]}
    assert len(reply.json()["choices"]) == 2
    assert words <= {"yes", "no", "true", "false"}


def test_who_waits_for_a_verdict_is_not_taken_for_work(served: Served, monkeypatch) -> None:
    """An engine without a step would look as if it hung."""
    sandbox = served.engine._grammars._sandbox
    examine = sandbox.examine
    seen = []

    async def look(fields: dict[str, Any], backend: str) -> Any:
        await asyncio.sleep(0)
        seen.append(served.engine.snapshot(0, list(served.server.accountings.values())))
        return await examine(fields, backend)

    monkeypatch.setattr(sandbox, "examine", look)
    assert ask(served, {"regex": "seen by nobody"}).status_code == 200
    [snapshot] = seen
    assert (snapshot.num_inflight_reqs, snapshot.num_pending_prefill_tokens) == (1, 0)


class Outputs:
    """vLLM's parameters, without vLLM."""

    def __init__(self, **fields: Any) -> None:
        self.json = self.regex = self.choice = self.grammar = self.structural_tag = None
        self.json_object = self.whitespace_pattern = None
        vars(self).update(fields)


STRING = {"type": "string"}
PERSON = {
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}},
        }
    },
    "type": "object",
    "title": "A person",
    "properties": {
        "name": {**STRING, "description": "in full"},
        "born": {**STRING, "format": "date"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None, 1]}, "minItems": 1},
        "list": {"$ref": "#/$defs/Node"},
        "pattern": {"type": ["string", "null"]},
    },
    "required": ["name"],
    "additionalProperties": False,
}


def test_usual_grammars_are_small() -> None:
    for outputs in (
        Outputs(json_object=True),
        Outputs(choice=["a", "b"]),
        Outputs(json=PERSON),
        Outputs(json=json.dumps(PERSON)),
    ):
        assert is_small(outputs)


@pytest.mark.parametrize(
    "outputs",
    [
        *TOO_MUCH.values(),
        {"regex": "a"},
        {"grammar": 'root ::= "a"'},
        {"structural_tag": "{}"},
        {"choice": ["a"] * 300},
        {"json": "{"},
        {"json": {**STRING, "pattern": "a"}},
        {"json": {**STRING, "maxLength": 100}},
        {"json": {**STRING, "minLength": 2}},
        {"json": {**STRING, "format": "regex"}},
        {"json": {"allOf": [STRING, STRING]}},
        {"json": {"properties": {"a": {"oneOf": [STRING]}}}},
        {"json": {"items": [STRING]}},
        {"json": {"anyOf": {"a": STRING}}},
        {"json": {"type": "integer", "maximum": 10**40}},
        {"json": {"type": "number", "maximum": 0.1}},
        {"json": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
        {"json": {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}},
        {"json": {"$ref": "https://example.com/schema"}},
        {"json": {"properties": {f"p{number}": STRING for number in range(300)}}},
        {"json": {"enum": [f"value {number}" for number in range(300)]}},
    ],
)
def test_others_are_not(outputs: dict[str, Any]) -> None:
    assert not is_small(Outputs(**outputs))


def test_the_bounds_are_settings() -> None:
    config = EngineConfig(grammar_timeout_s=1.5, grammar_max_bytes=2**24)
    assert (config.grammar_timeout_s, config.grammar_max_bytes) == (1.5, 2**24)
