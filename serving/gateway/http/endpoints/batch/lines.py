"""What is in the file of a batch, what is wrong with it, and how do its answers look?

Lines are read as they are needed, never the whole file.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from serving.gateway.http.endpoints.batch.objects import MAX_ERRORS, BatchError, BatchUsage
from serving.gateway.intake.json_body import ENDPOINTS, with_fields

_MAX_ID_LENGTH = 512  # a line's id is told again with its answer
_MAX_MODELS = 100  # of one batch

# Endpoints that batches may be for: they compute, and take JSON.
BATCH_ENDPOINTS = tuple(path for path, endpoint in ENDPOINTS.items() if not endpoint.is_form)


class Line(msgspec.Struct, frozen=True):
    """One request of a batch."""

    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


class _Body(msgspec.Struct, frozen=True):
    model: Any = None
    stream: Any = None
    background: Any = None
    priority_class: Any = None


class Checked(NamedTuple):
    """What there is in a file."""

    total: int  # lines
    models: dict[str, int]  # the first line of each model; "" where a line names none
    errors: list[BatchError]


def numbered_lines(path: Path, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield every line that is not blank with its number, from 1.

    Of a line of more than `max_bytes` as much comes as is needed to see that.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(max_bytes + 2):
            number += 1
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(2**16)
            if line.strip():
                yield number, line


def read_line(data: bytes) -> tuple[str, str, bytes]:
    """Return id, path and body of a line that `check_file` has passed.

    The body names class `batch` if it names any.
    """
    line = msgspec.json.decode(data, type=Line)
    body = bytes(line.body)
    if msgspec.json.decode(body, type=_Body).priority_class is not None:
        body = with_fields(body, {"priority_class": "batch"})
    return line.custom_id, line.url, body


def check_file(path: Path, endpoint: str, max_lines: int, max_line_bytes: int) -> Checked:
    """Return what there is in a file of a batch for `endpoint`, and what is wrong with it."""
    total = 0
    models: dict[str, int] = {}
    errors: list[BatchError] = []
    ids: set[bytes] = set()
    for number, data in numbered_lines(path, max_line_bytes):
        total += 1
        if total > max_lines:
            message = f"The file has more than {max_lines} requests (batch.max_lines)."
            errors.insert(0, BatchError("too_many_tasks", message))
            break
        if len(data) > max_line_bytes + 1:
            message = f"The line is longer than {max_line_bytes} bytes (gateway.max_body_bytes)."
            errors.append(BatchError("invalid_request", message, None, number))
        else:
            error = _check_line(data, endpoint, number, ids, models)
            if error is not None:
                errors.append(error)
        if len(errors) >= MAX_ERRORS:
            break
    if not total:
        errors.append(BatchError("empty_file", "The input file has no requests."))
    return Checked(total, models, errors[:MAX_ERRORS])


def _check_line(
    data: bytes, endpoint: str, number: int, ids: set[bytes], models: dict[str, int]
) -> BatchError | None:
    """Note id and model of a line. Return what is wrong with it, None if nothing is."""
    try:
        everything = msgspec.json.decode(data)
        if not isinstance(everything, dict):
            raise msgspec.ValidationError("it is not an object")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        message = f"This line is not parseable as valid JSON: {error}"
        return BatchError("invalid_json_line", message, None, number)
    for name in ("custom_id", "method", "url", "body"):
        if name not in everything:
            message = f"Missing required parameter: '{name}'."
            return BatchError("missing_required_parameter", message, name, number)
    custom_id, body = everything["custom_id"], everything["body"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_ID_LENGTH:
        message = f"'custom_id' has to be a string of 1 to {_MAX_ID_LENGTH} characters."
        return BatchError("invalid_request", message, "custom_id", number)
    digest = hashlib.blake2b(custom_id.encode(errors="surrogatepass"), digest_size=16).digest()
    if digest in ids:
        message = (
            "The custom_id for this request is a duplicate of another request. The custom_id "
            "parameter must be unique for each request in a batch."
        )
        return BatchError("duplicate_custom_id", message, "custom_id", number)
    ids.add(digest)
    if everything["method"] != "POST":
        return BatchError("invalid_method", "'method' has to be 'POST'.", "method", number)
    if everything["url"] != endpoint:
        message = "The URL provided for this request does not match the batch endpoint."
        return BatchError("invalid_url", message, "url", number)
    if not isinstance(body, dict):
        return BatchError("invalid_request", "'body' has to be an object.", "body", number)
    return _check_body(body, number, models)


def _check_body(body: dict[str, Any], number: int, models: dict[str, int]) -> BatchError | None:
    for name in ("stream", "background"):
        if body.get(name) not in (None, False):
            message = f"'{name}' is not supported in a batch."
            return BatchError("invalid_request", message, f"body.{name}", number)
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        return BatchError("invalid_request", "'model' has to be a string.", "body.model", number)
    if (model or "") not in models:
        if len(models) >= _MAX_MODELS:
            message = f"A batch may be for at most {_MAX_MODELS} models."
            return BatchError("invalid_request", message, "body.model", number)
        models[model or ""] = number
    return None


# --- answers --------------------------------------------------------------------------


def answer_line(
    batch_id: str, number: int, custom_id: str, status: int, request_id: str, body: bytes
) -> bytes:
    """Return the line that tells an answer of the gateway's."""
    try:
        text = msgspec.Raw(body.replace(b"\n", b" ").replace(b"\r", b" "))
        msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        text = msgspec.Raw(msgspec.json.encode(body.decode(errors="replace")))
    response = {"status_code": status, "request_id": request_id, "body": text}
    return _line(batch_id, number, custom_id, response, None)


def error_line(batch_id: str, number: int, custom_id: str, code: str, message: str) -> bytes:
    """Return the line that tells why a request was not answered at all."""
    return _line(batch_id, number, custom_id, None, {"code": code, "message": message})


def _line(
    batch_id: str,
    number: int,
    custom_id: str,
    response: dict[str, Any] | None,
    error: dict[str, str] | None,
) -> bytes:
    return msgspec.json.encode(
        {
            "id": f"batch_req_{batch_id.removeprefix('batch_')}_{number}",
            "custom_id": custom_id,
            "response": response,
            "error": error,
        }
    )


class _Details(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct, frozen=True):
    """In the words of chat and completions, or of responses and messages."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Answer(msgspec.Struct, frozen=True):
    usage: _Usage | None = None


def usage_of(body: bytes) -> BatchUsage:
    """Return the tokens that an answer says it took; none where it does not say."""
    try:
        usage = msgspec.json.decode(body, type=_Answer).usage or _Usage()
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return BatchUsage()
    read = usage.prompt_tokens_details or usage.input_tokens_details or _Details()
    written = usage.completion_tokens_details or usage.output_tokens_details or _Details()
    return BatchUsage(
        usage.prompt_tokens or usage.input_tokens or 0,
        read.cached_tokens or 0,
        usage.completion_tokens or usage.output_tokens or 0,
        written.reasoning_tokens or 0,
    )
