"""What is in an upload? The few fields that the gateway reads; the bytes pass as they are."""

from abc import ABC, abstractmethod
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
    form = _Form(content_type, names, file_name)
    form.feed(data)
    form.finish()
    return form.fields, form.file


class FormReader(ABC):
    """Follows the parts of a multipart form as its bytes come; what is kept of them, others say.

    Raises `ApiError` 400 or 415.
    """

    def __init__(self, content_type: bytes | str, max_parts: int, error_kind: str) -> None:
        media_type, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if media_type != b"multipart/form-data" or not boundary:
            raise ApiError(
                415,
                "Unsupported Media Type: multipart/form-data with a boundary is needed here",
                kind="Unsupported Media Type",
            )
        self.fields: dict[str, str] = {}
        self._error_kind = error_kind
        self._max_parts = max_parts
        self._num_parts = 0
        self._is_over = False
        self._header = self._value = b""
        self._name = ""  # of the part that comes now
        callbacks: Any = {
            "on_part_begin": self._begin_part,
            "on_part_data": self._add_data,
            "on_part_end": self._end_part,
            "on_header_field": self._add_to_header,
            "on_header_value": self._add_to_value,
            "on_header_end": self._end_header,
            "on_end": self._end,
        }
        self._parser = python_multipart.MultipartParser(boundary, callbacks)

    def feed(self, data: bytes) -> None:
        """Read the next bytes."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise self._wrong(str(error)) from None

    def finish(self) -> None:
        """There are no more bytes."""
        try:
            self._parser.finalize()
        except FormParserError as error:
            raise self._wrong(str(error)) from None
        if not self._is_over:
            raise self._wrong("its end is missing")

    def _name_part(self, name: str, filename: str) -> None:
        """A part says how it is called."""
        self._name = name

    @abstractmethod
    def _add_data(self, data: bytes, start: int, end: int) -> None:
        """Some of the content of the part that comes now."""

    @abstractmethod
    def _end_part(self) -> None:
        """The part has come as a whole."""

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > self._max_parts:
            raise self._wrong(f"it has more than {self._max_parts} parts")
        self._name = ""

    def _add_to_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            name, filename = options.get(b"name", b""), options.get(b"filename", b"")
            self._name_part(name.decode(errors="replace"), filename.decode(errors="replace"))
        self._header = self._value = b""

    def _end(self) -> None:
        self._is_over = True

    def _wrong(self, why: str) -> ApiError:
        message = f"The upload cannot be read: {why}"
        return ApiError(400, message, kind=self._error_kind, param="body")


class _Form(FormReader):
    """Collects what we read."""

    def __init__(self, content_type: bytes, names: frozenset[str], file_name: str) -> None:
        super().__init__(content_type, _MAX_PARTS, "Bad Request")
        self.file = b""
        self._names = names
        self._file_name = file_name
        self._chunks: list[bytes] = []

    def _begin_part(self) -> None:
        super()._begin_part()
        self._chunks = []

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == self._file_name or self._name in self._names:
            self._chunks.append(data[start:end])

    def _end_part(self) -> None:
        content = b"".join(self._chunks)
        if self._name == self._file_name:
            self.file = content
        elif self._name in self._names:
            if len(content) > _MAX_FIELD_BYTES:
                raise self._wrong(f"'{self._name}' is too long")
            self.fields[self._name] = content.decode(errors="replace")
