"""Which request bodies are accepted, while they arrive?"""

from serving.config import GatewayConfig
from serving.gateway.http.errors import ApiError
from serving.stream.frames import Headers

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
        self.config = config

    def begin(self, headers: Headers) -> "IncomingBody":
        """Return a body of which nothing has come yet, but the head of its request.

        Raise `ApiError`: 413 for one that is too large, if the client waits for a word;
        415 for one that is compressed.
        """
        num_announced, is_awaited = 0, False
        for name, value in headers:
            if name == b"content-encoding" and value not in _ENCODINGS:
                raise ApiError(
                    415,
                    f"content-encoding {value.decode('latin-1')!r} is not read here: send the "
                    "body as it is.",
                    kind="Unsupported Media Type",
                    headers=[(b"accept-encoding", b"identity")],
                )
            if name == b"content-length":
                num_announced = int(value or 0)
            elif name == b"expect":
                is_awaited = True
        is_too_large = num_announced > self.config.max_body_bytes
        if is_too_large and is_awaited:
            raise self.too_large()
        return IncomingBody(self, is_too_large=is_too_large)

    def too_large(self) -> ApiError:
        """Return the refusal of a body that is too large."""
        return ApiError(
            413,
            "The request body is larger than gateway.max_body_bytes "
            f"({self.config.max_body_bytes} bytes).",
            code="request_too_large",
        )


class IncomingBody:
    """One request's body, while it arrives."""

    __slots__ = ("_chunks", "_is_too_large", "_num_kept", "_num_read", "_reader")

    def __init__(self, reader: BodyReader, *, is_too_large: bool) -> None:
        self._reader = reader
        self._is_too_large = is_too_large
        self._chunks: list[bytes] = []
        self._num_kept = self._num_read = 0

    def add(self, chunk: bytes) -> None:
        """Take what has come. Raise `ApiError`: 413 far beyond the limit, 429 beyond all."""
        reader, num_bytes = self._reader, len(chunk)
        limit = reader.config.max_body_bytes
        self._num_read += num_bytes
        if self._num_read > limit:
            self._is_too_large = True
            self.drop()
            if self._num_read > _DISCARD_FACTOR * limit:
                raise reader.too_large()
        elif reader.num_bytes + num_bytes > reader.config.max_incoming_bytes:
            raise ApiError(
                429,
                "Too many request bodies are on their way (gateway.max_incoming_bytes).",
                kind="RateLimitError",
                code="too_many_bodies",
                retry_after_s=_RETRY_AFTER_S,
            )
        else:
            self._chunks.append(chunk)
            self._num_kept += num_bytes
            reader.num_bytes += num_bytes

    def take(self) -> bytes:
        """Return the body, which is complete. Raise `ApiError` 413 for one that is too large."""
        chunks = self._chunks
        self.drop()
        if self._is_too_large:
            raise self._reader.too_large()
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def drop(self) -> None:
        """Keep nothing of it."""
        self._reader.num_bytes -= self._num_kept
        self._num_kept, self._chunks = 0, []
