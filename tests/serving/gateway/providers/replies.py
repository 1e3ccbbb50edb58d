"""What providers send: events, and replies made of them."""

import json

from tests.support.provider_server import Script


def event(chunk: dict | list) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def delta(content: str | None = None, finish: str | None = None, index: int = 0, **said) -> bytes:
    said |= {} if content is None else {"content": content}
    choice = {"index": index, "delta": said, "finish_reason": finish}
    return event({"id": "c", "object": "chat.completion.chunk", "choices": [choice]})


ROLE = delta("", role="assistant")
ERROR = event({"error": {"message": "overloaded", "type": "server_error"}})
ONE_FAILURE_OPENS = {"breaker": {"max_consecutive_failures": 1}}
DONE = b"data: [DONE]\n\n"
PAGE = b"<!doctype html>\n\n<title>502 Bad Gateway</title>\n\n<p>nginx</p>\n\n"
GOOD = delta("good ", role="assistant") + delta("", "stop") + DONE
GOOD_WHOLE = Script(
    b'{"choices": [{"index": 0, "message": {"content": "good"}, "finish_reason": "stop"}]}',
    content_type="application/json",
)
