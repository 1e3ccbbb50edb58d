"""Which headers does every reply bear, whatever answers?

The outermost application puts them into a request's scope; whoever answers takes them from there.
"""

import random

from starlette.types import Scope

from serving.stream.frames import Headers

REQUEST_ID, CONTENT_LENGTH = b"x-request-id", b"content-length"

# Seeded by the system once: to ask it for every id takes a system call. Ids are no secrets.
_random = random.Random()


def find_request_id(headers: Headers) -> str:
    """Return the id that the client gives its request, whatever it is; a new one for none."""
    for name, value in headers:
        if name == b"x-request-id" and value:
            return value.decode("latin-1")
    return new_id()


def new_id() -> str:
    """Return an id that no other request has, in any gateway: 128 random bits in hex."""
    return f"{_random.getrandbits(128):032x}"


def set_own_headers(
    scope: Scope, request_id: str, others: Headers, *, tells_id: bool = True
) -> None:
    """Have every reply to this request bear `others`, and its id unless the server adds that."""
    state = scope.setdefault("state", {})
    state["request_id"] = request_id
    state["tells_id"] = tells_id
    state["other_headers"] = others


def set_request_id(scope: Scope, request_id: str) -> None:
    """Have every reply to this request bear another id, by which it is known from here on."""
    scope["state"]["request_id"] = request_id


def add_own_headers(scope: Scope, headers: Headers) -> None:
    """Have every reply to this request bear these, too."""
    state = scope["state"]
    state["other_headers"] = [*state["other_headers"], *headers]


def request_id_of(scope: Scope) -> str:
    """Return the id by which the request is known."""
    return scope["state"]["request_id"]


def own_headers(scope: Scope) -> Headers:
    """Return the headers of every reply to this request."""
    state = scope["state"]
    if not state["tells_id"]:
        return list(state["other_headers"])
    return [(b"x-request-id", state["request_id"].encode("latin-1")), *state["other_headers"]]
