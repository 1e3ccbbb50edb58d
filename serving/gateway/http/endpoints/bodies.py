"""Which bodies do the endpoints of ours take?"""

from typing import Any

import msgspec
from starlette.requests import Request

from serving.gateway.http.errors import ApiError

MAX_BYTES = 64 * 2**10


async def read_json(request: Request) -> Any:
    """Return the body's content, None for no body.

    Raise `ApiError` 400, 413 or 415. A web page of somebody else's can send JSON only as some
    other type, unless we allow it to.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BYTES:
            raise ApiError(
                413, f"The request body is larger than {MAX_BYTES} bytes.", code="request_too_large"
            )
    if not body:
        return None
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(
            415,
            f"content-type {media_type!r}: has to be application/json",
            kind="Unsupported Media Type",
        )
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ApiError(400, f"The request body is not valid JSON: {error}") from None
