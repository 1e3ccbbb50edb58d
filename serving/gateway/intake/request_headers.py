"""What do the headers of a request say, to us and to vLLM behind us?"""

import re

import msgspec

from router import RequestClass
from serving.gateway.http.errors import ApiError
from serving.stream.frames import Headers

# All that vLLM's layer reads; a test looks into its source. Credentials stay here.
FORWARDED = (
    b"endpoint-load-metrics-format",
    b"traceparent",
    b"tracestate",
    b"x-data-parallel-rank",
    b"x-session-id",
    b"x-vllm-priority",
)
_INTEGER = re.compile(rb"\s*[+-]?\d{1,19}\s*")


class RequestHeaders(msgspec.Struct, frozen=True):
    """The headers that mean something."""

    forwarded: Headers  # to vLLM, as they came
    request_id: bytes | None = None  # the client's own; None: it has none
    request_class: RequestClass | None = None
    priority: int | None = None  # goes before the body's; lower is first
    content_type: bytes = b""
    session: str = ""  # requests of one conversation; the body's goes before it, as in vLLM


def read_headers(headers: Headers) -> RequestHeaders:
    """Return what is in a request's headers. Raise `ApiError` 400 for a class that is none."""
    forwarded: Headers = []
    request_id, request_class, priority, content_type, session = None, None, None, b"", ""
    for name, value in headers:
        if name == b"x-request-id":
            request_id = value
        elif name == b"content-type":
            content_type = value
        elif name == b"x-headway-class":
            request_class = _parse_class(value)
        elif name in FORWARDED:
            forwarded.append((name, value))
            if name == b"x-vllm-priority" and _INTEGER.fullmatch(value):
                priority = int(value)
            elif name == b"x-session-id":
                session = value.decode("latin-1")
    return RequestHeaders(forwarded, request_id, request_class, priority, content_type, session)


def _parse_class(value: bytes) -> RequestClass:
    try:
        return RequestClass(value.decode("latin-1"))
    except ValueError:
        raise ApiError(
            400,
            "x-headway-class: one of " + ", ".join(known.value for known in RequestClass),
            param="x-headway-class",
        ) from None
