"""Which requests may be answered from the response cache, and under which key?"""

import hashlib

import msgspec

from serving.gateway.intake.fields import Fields

# Say nothing about the answer: who asked, and how urgent it is.
_NEUTRAL = ("user", "priority", "priority_class", "request_id", "safety_identifier", "metadata")
_TOOLS = ("tools", "functions", "web_search_options")
# The Responses API: what it asks for depends on, or changes, what the server keeps.
_STATEFUL = ("previous_response_id", "conversation", "background", "store")


def cache_key(
    path: str,
    body: bytes,
    fields: Fields,
    model: str,
    scope: tuple[str, ...],
    *,
    with_tools: bool,
) -> str | None:
    """Return the key of a deterministic request, 64 hexadecimal digits; None for any other.

    Deterministic means temperature 0, or a seed, or embeddings. The body counts by what it
    says, not by how it is written: order of keys, spaces, null for absent; and by what vLLM takes
    its `fields` for. `model` is the one that answers, `scope` whatever else must agree (tenant,
    revision). A reply is kept in the form it was asked for: whether it is a stream is part of the
    key, so each form is replayed byte by byte as vLLM wrote it.
    """
    if not fields.is_deterministic or b'_url"' in body:  # may lie elsewhere, and change there
        return None
    try:
        said = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return None  # only Python's `json` can read it
    said |= fields.given()
    said = {name: value for name, value in said.items() if value is not None}
    if any(said.get(name) for name in _STATEFUL):
        return None
    if not with_tools and any(said.get(name) for name in _TOOLS):
        return None
    for name in _NEUTRAL:
        said.pop(name, None)
    said["model"] = model
    said["stream"] = fields.is_stream
    try:
        canonical = msgspec.json.encode([path, *scope, said], order="deterministic")
    except RecursionError:
        return None
    return hashlib.sha256(canonical).hexdigest()
