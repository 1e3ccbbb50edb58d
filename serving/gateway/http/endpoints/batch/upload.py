"""How does an upload become a file? Written as it comes: it is never in memory as a whole."""

import asyncio
import contextlib
import os
from pathlib import Path
from typing import BinaryIO

from starlette.requests import ClientDisconnect, Request

from serving.gateway.http.errors import ApiError
from serving.gateway.intake.multipart import FormReader

_MAX_FIELD_BYTES = 1024
_MAX_PARTS = 20
_MAX_FORM_BYTES = 64 * 2**10  # of an upload beside its file
_WRITE_BYTES = 2**20  # at a time, in a thread
# Many clients read a refusal only once all is sent, and would see a reset connection. Beyond this
# many times the limit they are cut off.
_DISCARD_FACTOR = 2


class Upload(FormReader):
    """Fields and file of a form, as a parser finds them. Raises `ApiError` 400, 413 or 415."""

    def __init__(self, request: Request, max_bytes: int) -> None:
        """`max_bytes` of a file are taken."""
        content_type = request.headers.get("content-type", "")
        super().__init__(content_type, _MAX_PARTS, "invalid_request_error")
        self.filename: str | None = None  # None: no file has come
        self._request = request
        self._max_bytes = max_bytes
        self._num_file_bytes = 0
        self._field = b""
        self._chunks: list[bytes] = []  # of the file, yet to be written

    async def write_to(self, path: Path) -> None:
        """Read all of it, and write the file, which is on the disk then."""
        with path.open("wb") as file:
            num_bytes = 0
            most = _DISCARD_FACTOR * self._max_bytes + _MAX_FORM_BYTES
            async for chunk in self._request.stream():
                num_bytes += len(chunk)
                if num_bytes > most:
                    raise self._too_large()
                self.feed(chunk)
                if sum(map(len, self._chunks)) >= _WRITE_BYTES:
                    await asyncio.to_thread(self._write, file)
            self.finish()
            if self.filename is None:
                raise ApiError(400, "'file' is missing", kind="invalid_request_error", param="file")
            if self._num_file_bytes > self._max_bytes:
                raise self._too_large()
            await asyncio.to_thread(self._write, file)
            await asyncio.to_thread(_sync, file)

    def _write(self, file: BinaryIO) -> None:
        chunks, self._chunks = self._chunks, []
        file.writelines(chunks)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The file is larger than batch.max_file_bytes ({self._max_bytes} bytes).",
            kind="invalid_request_error",
            param="file",
            code="request_too_large",
        )

    # --- what the parser finds ------------------------------------------------------

    def _begin_part(self) -> None:
        super()._begin_part()
        self._field = b""

    def _name_part(self, name: str, filename: str) -> None:
        super()._name_part(name, filename)
        if name == "file":
            if self.filename is not None:
                raise self._wrong("it has several files")
            self.filename = os.path.basename(filename)[:255] or "upload"

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._num_file_bytes += end - start
            if self._num_file_bytes <= self._max_bytes:
                self._chunks.append(data[start:end])
        else:
            self._field += data[start:end]
            if len(self._field) > _MAX_FIELD_BYTES:
                raise self._wrong(f"'{self._name}' is too long")

    def _end_part(self) -> None:
        if self._name and self._name != "file":
            self.fields[self._name] = self._field.decode(errors="replace")


async def discard_rest(request: Request, max_bytes: int) -> None:
    """Read what still comes of an upload that is refused."""
    num_bytes = 0
    with contextlib.suppress(ClientDisconnect, RuntimeError):  # Starlette's, if all has been read
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > _DISCARD_FACTOR * max_bytes:
                return


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
