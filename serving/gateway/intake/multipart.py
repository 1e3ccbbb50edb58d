"""What is in an upload? The few fields that the gateway reads; the bytes pass as they are."""

from typing import Any

import python_multipart
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from serving.gateway.http.errors import ApiError

_MAX_FIELD_BYTES = 2**16  # of those that we read
_MAX_PARTS = 100


def read_form(
    content_type: bytes, data: bytes, names: frozenset[str], file_name: str
) -> tuple[dict[str, str], bytes]:
    """Return the fields of these names, and the content of the file. Raise `ApiError` 400 or 415.

    Of several fields of a name the last one counts, as with vLLM's.
    """
    media_type, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if media_type != b"multipart/form-data" or not boundary:
        raise ApiError(
            415,
            "Unsupported Media Type: multipart/form-data with a boundary is needed here",
            kind="Unsupported Media Type",
        )
    form = _Form(names, file_name)
    parser = python_multipart.MultipartParser(boundary, form.callbacks())
    try:
        parser.write(data)
        parser.finalize()
    except FormParserError as error:
        raise _wrong(str(error)) from None
    if not form.is_over:
        raise _wrong("its end is missing")
    return form.fields, form.file


class _Form:
    """Collects, from what a parser finds, what we read."""

    def __init__(self, names: frozenset[str], file_name: str) -> None:
        self.fields: dict[str, str] = {}
        self.file = b""
        self.is_over = False
        self._names = names
        self._file_name = file_name
        self._num_parts = 0
        self._header = self._value = b""
        self._name = ""
        self._chunks: list[bytes] = []

    def callbacks(self) -> Any:
        """Return what the parser calls."""
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
        self._name, self._chunks = "", []

    def _add_to_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            self._name = options.get(b"name", b"").decode(errors="replace")
        self._header = self._value = b""

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == self._file_name or self._name in self._names:
            self._chunks.append(data[start:end])

    def _end_part(self) -> None:
        content = b"".join(self._chunks)
        if self._name == self._file_name:
            self.file = content
        elif self._name in self._names:
            if len(content) > _MAX_FIELD_BYTES:
                raise _wrong(f"'{self._name}' is too long")
            self.fields[self._name] = content.decode(errors="replace")

    def _end(self) -> None:
        self.is_over = True


def _wrong(why: str) -> ApiError:
    return ApiError(400, f"The upload cannot be read: {why}", kind="Bad Request", param="body")
