"""Request bodies on their way in."""

from starlette.types import Receive, Scope

from serving.config import GatewayConfig
from serving.gateway.http.errors import ApiError

# An oversized body is read to its end before the refusal, or many clients
# would see a reset connection and never the reply; past this it is cut.
_DISCARD_FACTOR = 8
# Until some of what is on its way has come, or was cut for not coming: a guess.
_RETRY_AFTER_S = 1.0


class Bodies:
    """Reads bodies, each of them and all together bounded."""

    def __init__(self, config: GatewayConfig) -> None:
        self.num_bytes = 0  # received of bodies that are not whole yet
        self._config = config

    async def read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body, None if the client left before its end.

        Raises `ApiError`: 413 for one that is too large, 429 while too much is on its way.
        """
        limit = self._config.max_body_bytes
        headers = dict(scope["headers"])
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
