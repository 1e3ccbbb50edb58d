"""How is a body read, so that it says the same to us as to vLLM behind us?

vLLM's web framework reads it with Python's `json`, whatever its encoding. That takes 12 times as
long as looking for a few fields, so it is asked only where those cannot be found otherwise.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import ValidationError

from serving.gateway.http.errors import ApiError
from serving.gateway.intake.fields import (
    ChatFields,
    CompletionFields,
    EmbeddingFields,
    Fields,
    ResponseFields,
)

_ABSENT = msgspec.Raw(b"")
# Whatever else a field may hold, `json` is asked, and pydantic then.
_Scalar = bool | int | float | str | UnsetType | None
_MAX_LIST_BYTES = 2**16
# `json` takes at most 50 ms for so much. Larger bodies that only it can read (NaN, half of a
# surrogate pair) are refused: nothing else would be answered meanwhile.
_MAX_ODD_BYTES = 2**20


class Endpoint(NamedTuple):
    """An endpoint that runs a model."""

    fields: type[Fields]
    prompts: tuple[str, ...]  # fields that may hold the prompt
    task: str  # of vLLM's, which an engine must support
    lists: tuple[str, ...] = ("priority_class",)  # fields that may hold more than one value


_LISTS = ("priority_class", "logprob_token_ids")
ENDPOINTS: dict[str, Endpoint] = {
    "/v1/chat/completions": Endpoint(ChatFields, ("messages",), "generate", _LISTS),
    "/v1/completions": Endpoint(CompletionFields, ("prompt", "prompt_embeds"), "generate", _LISTS),
    "/v1/responses": Endpoint(
        ResponseFields, ("input",), "generate", ("priority_class", "include")
    ),
    "/v1/embeddings": Endpoint(EmbeddingFields, ("input", "messages"), "embed"),
}


class JsonBody(msgspec.Struct, frozen=True):
    """A body that vLLM can read."""

    data: bytes  # in UTF-8
    fields: Fields
    prompts: dict[str, bytes]  # JSON by field, of those that are there and not null or empty


def read_json_body(path: str, data: bytes) -> JsonBody:
    """Return a body with what the gateway reads of it. Raise `ApiError` 400 as vLLM would."""
    endpoint = ENDPOINTS[path]
    if not data:
        raise _not_json("it is empty")
    data = _in_utf8(data)
    try:
        found = msgspec.structs.asdict(_DECODERS[path](data))
        prompts = {name: bytes(found.pop(name)) for name in endpoint.prompts}
        for name in endpoint.lists:
            found[name] = _decode_list(name, bytes(found[name]))
        values = {name: value for name, value in found.items() if value is not UNSET}
    except (msgspec.MsgspecError, ValueError, RecursionError):
        everything = _read_slowly(data)
        values = {
            name: everything[name] for name in endpoint.fields.model_fields if name in everything
        }
        prompts = {name: _json_bytes(everything.get(name)) for name in endpoint.prompts}
    try:
        fields = endpoint.fields.model_validate(values)
    except ValidationError as error:
        raise _wrong_fields(error) from None
    prompts = {name: text for name, text in prompts.items() if text not in (b"", b"null", b"[]")}
    return JsonBody(data, fields, prompts)


def with_fields(data: bytes, added: Mapping[str, str | int]) -> bytes:
    """Return a JSON object, which is not empty, with some fields more; they win over its own.

    Of fields of the same name the last one counts, to Python's `json` and to ours alike. So the
    rest, which may be megabytes, is copied and not read.
    """
    if not added:
        return data
    end = data.rindex(b"}")
    return b"".join((memoryview(data)[:end], b",", memoryview(msgspec.json.encode(added))[1:]))


def read_object(data: bytes) -> dict[str, Any]:
    """Return all that is in a body which `read_json_body` has taken."""
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        return json.loads(data)


def _in_utf8(data: bytes) -> bytes:
    """Return a text in UTF-8 that comes in any of the encodings that `json` reads."""
    if data.isascii() and b"\0" not in data[:4]:
        return data  # as most is; the others' ASCII has zeros
    encoding = json.detect_encoding(data)
    try:
        # The rest of a body is not looked at here, but nobody behind us could read it either.
        text = data.decode(encoding, "surrogatepass")
        return data if encoding == "utf-8" else text.encode(errors="surrogatepass")
    except UnicodeDecodeError:
        raise _not_json("it is not in UTF-8, UTF-16 or UTF-32") from None


def _decode_list(name: str, text: bytes) -> Any:
    """Return what a field holds that may be long; UNSET if absent, or if it is no class of ours."""
    if not text:
        return UNSET
    if len(text) <= _MAX_LIST_BYTES:
        return msgspec.json.decode(text)
    if name == "priority_class":
        return UNSET  # to vLLM a field that it does not know
    raise ApiError(400, f"'{name}' is too long", kind="Bad Request", param=f"body.{name}")


def _read_slowly(data: bytes) -> dict[str, Any]:
    """Return all of a body, as vLLM reads it."""
    if len(data) > _MAX_ODD_BYTES:
        raise _not_json("no more is known of a body as large as this")
    try:
        everything = json.loads(data)
    except json.JSONDecodeError as error:
        raise _not_json(str(error), f"body.{error.pos}") from None
    except RecursionError:
        raise _not_json("it is nested too deeply") from None
    except ValueError as error:
        raise _not_json(str(error)) from None
    if not isinstance(everything, dict):
        raise ApiError(400, "The request body is not an object", kind="Bad Request", param="body")
    return everything


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")


def _not_json(why: str, param: str = "body") -> ApiError:
    return ApiError(
        400, f"The request body is not valid JSON: {why}", kind="Bad Request", param=param
    )


def _wrong_fields(error: ValidationError) -> ApiError:
    """Return what vLLM answers to fields that it cannot read."""
    problems = error.errors(include_url=False, include_context=False)
    lines = [
        f"{'.'.join(map(str, ('body', *problem['loc'])))}: {problem['msg']}"
        for problem in problems[:10]
    ]
    param = lines[0].partition(":")[0]
    return ApiError(400, "; ".join(lines), kind="Bad Request", param=param)


def _decoder(endpoint: Endpoint) -> Callable[[bytes], Any]:
    """Return what finds the fields of an endpoint in a body and makes no object of the rest."""
    found: list[tuple[str, Any, Any]] = [
        (name, _Scalar, UNSET)
        for name in endpoint.fields.model_fields
        if name not in endpoint.lists
    ]
    unread = [(name, msgspec.Raw, _ABSENT) for name in (*endpoint.lists, *endpoint.prompts)]
    return msgspec.json.Decoder(msgspec.defstruct("_Body", [*found, *unread])).decode


_DECODERS = {path: _decoder(endpoint) for path, endpoint in ENDPOINTS.items()}
