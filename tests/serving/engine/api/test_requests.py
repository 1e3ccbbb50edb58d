"""No request ends a real engine, and what is a request's own fault is answered as that."""

import json
import logging
from typing import Any

import pytest

from tests.serving.engine.conftest import Served

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def test_a_seed_draws_the_same_however_the_prompt_is_cut(served: Served) -> None:
    """In three steps, and, with all but its end cached, in one; vLLM's own core dies of the first.

    The second seed is there to show that they draw at all.
    """

    def ask(seed: int, salt: str) -> tuple[str, int]:
        before = served.engine._stats.num_steps_total
        reply = served.ask(
            {
                "prompt": [100 + number for number in range(300)],
                "seed": seed,
                "temperature": 1,
                "ignore_eos": True,
                "cache_salt": salt,
            }
        )
        assert reply.status_code == 200
        return reply.json()["choices"][0]["text"], served.engine._stats.num_steps_total - before

    in_parts, num_more_steps = ask(1, "a")
    at_once, num_steps = ask(1, "a")
    assert num_more_steps - num_steps == 2
    assert at_once == in_parts
    assert ask(1, "b") == (in_parts, num_more_steps)
    assert ask(2, "a")[0] != in_parts


HALF_A_PAIR = "\ud800"
TOO_LONG = 2**64
# What vLLM finds fault with late, or not at all: by its own handlers each is a 500.
UNSPEAKABLE: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": TOO_LONG},
    "stop": {"stop": HALF_A_PAIR},
    "bad_words": {"bad_words": [HALF_A_PAIR]},
    "request_id": {"request_id": HALF_A_PAIR},
    "vllm_xargs": {"vllm_xargs": {"a": HALF_A_PAIR}},
    "kv_transfer_params": {"kv_transfer_params": {HALF_A_PAIR: 1}},
    "repetition_detection": {
        "repetition_detection": {"max_pattern_size": TOO_LONG, "min_count": TOO_LONG}
    },
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("field", UNSPEAKABLE)
def test_what_the_core_cannot_be_told_is_refused(served: Served, field: str, stream: bool) -> None:
    body = {"model": "tiny", "prompt": "Once", "max_tokens": 4, "stream": stream}
    reply = served.ask_engine(json.dumps(body | UNSPEAKABLE[field]).encode())
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == ("BadRequestError", 400)
    assert "cannot be passed to the engine: " in error["message"]
    served.assert_nothing_is_left()


def test_a_stream_is_refused_as_any_other_request_is(served: Served) -> None:
    """By vLLM alone its status would be 200, with the error in the stream."""
    body = {"prompt": "Once", "stop_token_ids": [TOO_LONG]}
    replies = [served.ask({**body, "stream": stream}) for stream in (False, True)]
    assert [reply.status_code for reply in replies] == [400, 400]
    assert replies[0].json() == replies[1].json()
    assert replies[0].json()["error"]["param"] == "stop_token_ids"


def test_warnings_are_not_silenced(served: Served) -> None:
    assert logging.getLogger("serving.anything").isEnabledFor(logging.WARNING)


def test_an_engines_failure_is_told_in_vllms_words(served: Served, monkeypatch) -> None:
    """Its handler reaches for the server that its own launcher would have set."""

    async def add_request(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr(served.engine._llm, "add_request", add_request)
    reply = served.ask_engine(b'{"model": "tiny", "prompt": "Once"}')
    assert reply.status_code == 500
    assert reply.json()["error"]["type"] == "InternalServerError"
    assert "State" not in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("value", [[], "a", 1.5, True])
def test_a_field_that_vllms_checks_break_down_on_is_refused(served: Served, path, value) -> None:
    prompt = (
        {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "a"}
    )
    reply = served.ask({**prompt, "structured_outputs": value}, path)
    assert reply.status_code == 400
    assert "field of a wrong type" in reply.json()["error"]["message"]
