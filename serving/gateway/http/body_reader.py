"""Which request bodies are accepted, while they arrive?"""

from starlette.types import Receive, Scope

from serving.config import GatewayConfig
from serving.gateway.http.errors import ApiError

# An oversized body is read to its end before it is refused, or many clients would see a
# reset connection and never the reply. Beyond this many times the limit it is cut off.
_DISCARD_FACTOR = 8
# A guess: by then other bodies have arrived, or were cut off for being late.
_RETRY_AFTER_S = 1.0
_ENCODINGS = (b"", b"identity")


class BodyReader:
    """Read request bodies; bound each of them, and all together."""

    def __init__(self, config: GatewayConfig) -> None:
        self.num_bytes = 0  # received so far of all incomplete bodies
        self._config = config

    async def read_body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body; None if the client left before its end.

        Raise `ApiError`: 413 for a body that is too large, 429 while all together are, 415 for
        one that is compressed.
        """
        limit = self._config.max_body_bytes
        headers = dict(scope["headers"])
        if (encoding := headers.get(b"content-encoding", b"identity")) not in _ENCODINGS:
            raise ApiError(
                415,
                f"content-encoding {encoding.decode('latin-1')!r} is not read here: send the body "
                "as it is.",
                kind="Unsupported Media Type",
                headers=[(b"accept-encoding", b"identity")],
            )
        too_large = int(headers.get(b"content-length", b"0") or 0) > limit
        if too_large and b"expect" in headers:
            raise self._too_large()
        chunks: list[bytes] = []
        num_kept = num_read = 0
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                chunk = message.get("body", b"")
                num_read += len(chunk)
                if num_read > limit:
                    too_large = True
                    chunks.clear()
                    self.num_bytes -= num_kept
                    num_kept = 0
                    if num_read > _DISCARD_FACTOR * limit:
                        break
                elif self.num_bytes + len(chunk) > self._config.max_incoming_bytes:
                    raise ApiError(
                        429,
                        "Too many request bodies are on their way (gateway.max_incoming_bytes).",
                        kind="RateLimitError",
                        code="too_many_bodies",
                        retry_after_s=_RETRY_AFTER_S,
                    )
                else:
                    chunks.append(chunk)
                    num_kept += len(chunk)
                    self.num_bytes += len(chunk)
                if not message.get("more_body", False):
                    break
        finally:
            self.num_bytes -= num_kept
        if too_large:
            raise self._too_large()
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            "The request body is larger than gateway.max_body_bytes "
            f"({self._config.max_body_bytes} bytes).",
            code="request_too_large",
        )
