"""How does an upload become a file? Written as it comes: it is never in memory as a whole."""

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import python_multipart
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request

from serving.gateway.http.errors import ApiError

_MAX_FIELD_BYTES = 1024
_MAX_PARTS = 20
_MAX_FORM_BYTES = 64 * 2**10  # of an upload beside its file
_WRITE_BYTES = 2**20  # at a time, in a thread
# Many clients read a refusal only once all is sent, and would see a reset connection. Beyond this
# many times the limit they are cut off.
_DISCARD_FACTOR = 2


class Upload:
    """Fields and file of a form, as a parser finds them. Raises `ApiError` 400, 413 or 415."""

    def __init__(self, request: Request, max_bytes: int) -> None:
        """`max_bytes` of a file are taken."""
        content_type = request.headers.get("content-type", "")
        media_type, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if media_type != b"multipart/form-data" or not boundary:
            raise ApiError(
                415,
                "Unsupported Media Type: multipart/form-data with a boundary is needed here",
                kind="Unsupported Media Type",
            )
        self.fields: dict[str, str] = {}
        self.filename: str | None = None  # None: no file has come
        self._request = request
        self._max_bytes = max_bytes
        self._parser = python_multipart.MultipartParser(boundary, self._callbacks())
        self._num_file_bytes = self._num_parts = 0
        self._is_over = False
        self._header = self._value = b""
        self._name = self._part_filename = ""
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
                try:
                    self._parser.write(chunk)
                except FormParserError as error:
                    raise _wrong(str(error)) from None
                if sum(map(len, self._chunks)) >= _WRITE_BYTES:
                    await asyncio.to_thread(self._write, file)
            try:
                self._parser.finalize()
            except FormParserError as error:
                raise _wrong(str(error)) from None
            if not self._is_over:
                raise _wrong("its end is missing")
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

    def _callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin_part,
            "on_part_data": self._add_data,
            "on_part_end": self._end_part,
            "on_header_field": self._add_to_header,
            "on_header_value": self._add_to_value,
            "on_header_end": self._end_header,
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > _MAX_PARTS:
            raise _wrong(f"it has more than {_MAX_PARTS} parts")
        self._name, self._part_filename, self._field = "", "", b""

    def _add_to_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            self._name = options.get(b"name", b"").decode(errors="replace")
            self._part_filename = options.get(b"filename", b"").decode(errors="replace")
            if self._name == "file":
                if self.filename is not None:
                    raise _wrong("it has several files")
                self.filename = os.path.basename(self._part_filename)[:255] or "upload"
        self._header = self._value = b""

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._num_file_bytes += end - start
            if self._num_file_bytes <= self._max_bytes:
                self._chunks.append(data[start:end])
        else:
            self._field += data[start:end]
            if len(self._field) > _MAX_FIELD_BYTES:
                raise _wrong(f"'{self._name}' is too long")

    def _end_part(self) -> None:
        if self._name and self._name != "file":
            self.fields[self._name] = self._field.decode(errors="replace")

    def _end(self) -> None:
        self._is_over = True


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


def _wrong(why: str) -> ApiError:
    return ApiError(
        400, f"The upload cannot be read: {why}", kind="invalid_request_error", param="body"
    )
