"""How is a body read, so that it says the same to us as to vLLM behind us?

vLLM's web framework reads it with Python's `json`, whatever its encoding. That takes 12 times as
long as looking for a few fields, so it is asked only where those cannot be found otherwise.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict

import msgspec
from pydantic import ValidationError

from serving.gateway.http.errors import ApiError
from serving.gateway.intake.fields import (
    ChatFields,
    CohereChatFields,
    CompletionFields,
    EmbeddingFields,
    Fields,
    MessageFields,
    RankingFields,
    ResponseFields,
    SpeechFields,
    TokenFields,
)
from serving.gateway.intake.multipart import read_form

# Whatever else a field may hold, `json` is asked, and pydantic then.
_Scalar = bool | int | float | str | None
_NOTHING = (b"", b"null", b"[]")  # as a prompt
_MAX_LIST_BYTES = 2**16
# `json` takes at most 50 ms for so much. Larger bodies that only it can read (NaN, half of a
# surrogate pair) are refused: nothing else would be answered meanwhile.
_MAX_ODD_BYTES = 2**20
# What an error about fields says of them: vLLM's own bounds.
_MAX_PROBLEMS, _MAX_INPUT_CHARS = 10, 200


class Endpoint(NamedTuple):
    """An endpoint that runs a model."""

    fields: type[Fields]
    prompts: tuple[str, ...]  # fields that may hold the prompt
    task: str  # of vLLM's, which an engine must support; "": its routes say whether it does
    lists: tuple[str, ...] = ("priority_class",)  # fields that may hold more than one value
    is_one: bool = False  # the fields of the prompt make up one
    is_form: bool = False  # the body is multipart/form-data, and its prompt is a file
    for_providers: bool = False  # they may have it, too


_LISTS = ("priority_class", "logprob_token_ids")
_SCORE = Endpoint(
    RankingFields, ("text_1", "queries", "data_1", "text_2", "documents", "items", "data_2"), ""
)
_RERANK = Endpoint(RankingFields, ("query", "documents"), "")
_SPEECH = Endpoint(SpeechFields, ("file",), "", (), is_form=True)
ENDPOINTS: dict[str, Endpoint] = {
    "/v1/chat/completions": Endpoint(
        ChatFields, ("messages",), "generate", _LISTS, for_providers=True
    ),
    "/v1/chat/completions/batch": Endpoint(ChatFields, ("messages",), "generate", _LISTS),
    "/v1/completions": Endpoint(
        CompletionFields, ("prompt", "prompt_embeds"), "generate", _LISTS, for_providers=True
    ),
    "/v1/responses": Endpoint(
        ResponseFields, ("input",), "generate", ("priority_class", "include"), for_providers=True
    ),
    "/v1/messages": Endpoint(
        MessageFields,
        ("messages", "system", "tools"),
        "generate",
        ("priority_class", "metadata"),
        is_one=True,
    ),
    "/v1/embeddings": Endpoint(EmbeddingFields, ("input", "messages"), "embed", for_providers=True),
    "/v2/embed": Endpoint(RankingFields, ("texts", "inputs", "images"), "embed"),
    "/pooling": Endpoint(RankingFields, ("input", "messages", "data"), ""),
    "/classify": Endpoint(RankingFields, ("input", "messages"), "classify"),
    "/score": _SCORE,
    "/v1/score": _SCORE,
    "/rerank": _RERANK,
    "/v1/rerank": _RERANK,
    "/v2/rerank": _RERANK,
    "/generative_scoring": Endpoint(RankingFields, ("items", "query"), "generate"),
    "/v1/systemone": Endpoint(RankingFields, ("state", "questions"), "", is_one=True),
    "/v1/audio/transcriptions": _SPEECH,
    "/v1/audio/translations": _SPEECH,
    "/inference/v1/generate": Endpoint(
        TokenFields, ("token_ids",), "generate", ("priority_class", "sampling_params")
    ),
    "/cohere/v2/chat": Endpoint(
        CohereChatFields, ("messages", "documents", "tools"), "generate", is_one=True
    ),
}
# Which endpoint a body at vLLM's `/invocations` is for, by its first field of these: in the order
# in which vLLM tries its endpoints.
_INVOKED = {
    "messages": ("/v1/chat/completions", "/v1/embeddings", "/classify", "/pooling"),
    "prompt": ("/v1/completions",),
    "input": ("/v1/embeddings", "/classify", "/pooling"),
    "query": ("/rerank",),
    "text_1": ("/score",),
    "queries": ("/score",),
    "data_1": ("/score",),
    "data": ("/pooling",),
}


class JsonBody(msgspec.Struct, frozen=True):
    """A body that vLLM can read."""

    data: bytes  # in UTF-8
    fields: Fields
    prompts: dict[str, bytes]  # JSON by field, of those that are there and not null or empty


def read_body(path: str, data: bytes, content_type: bytes) -> JsonBody:
    """Return a body with what the gateway reads of it. Raise `ApiError` 400 or 415."""
    endpoint = ENDPOINTS[path]
    if not endpoint.is_form:
        return read_json_body(path, data)
    [file_name] = endpoint.prompts
    names = frozenset(endpoint.fields.model_fields)
    values, file = read_form(content_type, data, names, file_name)
    try:
        fields = endpoint.fields.model_validate({k: v for k, v in values.items() if v != ""})
    except ValidationError as error:
        raise _wrong_fields(error) from None
    return JsonBody(data, fields, {file_name: file} if file else {})


def invoked_path(data: bytes, has_route: Callable[[str], bool]) -> str:
    """Return which endpoint a body at `/invocations` is for. Raise `ApiError` 400 for none."""
    found = _read_names(data)
    for name, paths in _INVOKED.items():
        if name in found:
            return next((path for path in paths if has_route(f"POST {path}")), paths[0])
    raise ApiError(400, "Cannot find suitable handler for request.", param="body")


def _read_names(data: bytes) -> set[str]:
    try:
        return set(msgspec.json.decode(_in_utf8(data), type=dict[str, msgspec.Raw]))
    except (msgspec.MsgspecError, RecursionError):
        return set(_read_slowly(data))


def read_json_body(path: str, data: bytes) -> JsonBody:
    """Return a body with what the gateway reads of it. Raise `ApiError` 400 as vLLM would."""
    endpoint = ENDPOINTS[path]
    if not data:
        raise _not_json("it is empty")
    data = _in_utf8(data)
    try:
        values = _DECODERS[path](data)
        prompts = {name: bytes(values.pop(name)) for name in endpoint.prompts if name in values}
        for name in endpoint.lists:
            if name in values:
                _decode_list(name, values)
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
    for name in [name for name, text in prompts.items() if text in _NOTHING]:
        del prompts[name]
    return JsonBody(data, fields, prompts)


def with_fields(data: bytes, added: Mapping[str, Any]) -> bytes:
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


def _decode_list(name: str, values: dict[str, Any]) -> None:
    """Decode what a field holds that may be long, unless it is none of ours."""
    text = bytes(values.pop(name))
    if len(text) <= _MAX_LIST_BYTES:
        values[name] = msgspec.json.decode(text)
    elif name not in ("priority_class", "metadata"):
        raise ApiError(400, f"'{name}' is too long", kind="Bad Request", param=f"body.{name}")
    # Else it is a field that vLLM does not know, or only passes by.


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
    """Return what vLLM answers to fields that it cannot read, in its form: programs look into it.

    Of what was sent it says as little back as vLLM does, which is bounded.
    """
    problems = error.errors(include_url=False)
    lines = [f"{len(problems)} validation error{'s' if len(problems) > 1 else ''}:"]
    for problem in problems[:_MAX_PROBLEMS]:
        said: dict[str, Any] = {**problem, "loc": _place(problem["loc"])}
        said["input"] = _as_said_back(problem["input"])
        lines.append(f"  {said}")
    if (num_more := len(problems) - _MAX_PROBLEMS) > 0:
        lines.append(f"  ...and {num_more} more errors")
    param = _place(problems[0]["loc"])
    return ApiError(400, "\n".join(lines), kind="Bad Request", param=param)


def _place(loc: tuple[int | str, ...]) -> str:
    return ".".join(map(str, ("body", *loc)))


def _as_said_back(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return f"<{type(value).__name__} of {len(value)} items>"
    text = str(value)
    return text if len(text) <= _MAX_INPUT_CHARS else text[:_MAX_INPUT_CHARS] + "...[truncated]"


_make_dict: Any = TypedDict  # by names that are known at run time


def _decoder(endpoint: Endpoint) -> Callable[[bytes], dict[str, Any]]:
    """Return what finds the fields of an endpoint in a body and makes no object of the rest."""
    kinds: dict[str, Any] = dict.fromkeys(endpoint.fields.model_fields, _Scalar)
    kinds |= dict.fromkeys((*endpoint.lists, *endpoint.prompts), msgspec.Raw)
    # What is not there is not in what is returned.
    body: Any = _make_dict("body", kinds, total=False)
    decode: Callable[[bytes], dict[str, Any]] = msgspec.json.Decoder(body).decode
    return decode


_DECODERS = {path: _decoder(endpoint) for path, endpoint in ENDPOINTS.items()}
