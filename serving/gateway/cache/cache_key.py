"""Which requests may be answered from the response cache, and under which key?"""

import hashlib
from typing import Any

import msgspec

# Say nothing about the answer: who asked, and how urgent it is.
_NEUTRAL = ("user", "priority", "priority_class", "request_id", "safety_identifier", "metadata")
_TOOLS = ("tools", "functions", "web_search_options")
# The Responses API: what it asks for depends on, or changes, what the server keeps.
_STATEFUL = ("previous_response_id", "conversation", "background", "store")


def cache_key(
    path: str, body: bytes, model: str, scope: tuple[str, ...], *, with_tools: bool
) -> str | None:
    """Return the key of a deterministic request, 64 hexadecimal digits; None for any other.

    Deterministic means temperature 0, or a seed, or embeddings. The body counts by what it
    says, not by how it is written: order of keys, spaces, null for absent. `model` is the one
    that answers, `scope` whatever else must agree (tenant, revision). A reply is kept in the
    form it was asked for: `stream` is part of the key, so each form is replayed byte by byte
    as vLLM wrote it.
    """
    if b'_url"' in body:  # may lie elsewhere, and change there
        return None
    fields = msgspec.json.decode(body)
    fields = {name: value for name, value in fields.items() if value is not None}
    if not _is_deterministic(path, fields) or any(fields.get(name) for name in _STATEFUL):
        return None
    if not with_tools and any(fields.get(name) for name in _TOOLS):
        return None
    for name in _NEUTRAL:
        fields.pop(name, None)
    fields["model"] = model
    fields["stream"] = bool(fields.get("stream"))
    if "temperature" in fields:
        fields["temperature"] = float(fields["temperature"])
    canonical = msgspec.json.encode([path, *scope, fields], order="deterministic")
    return hashlib.sha256(canonical).hexdigest()


def _is_deterministic(path: str, fields: dict[str, Any]) -> bool:
    if path == "/v1/embeddings":
        return True
    temperature = fields.get("temperature")
    if isinstance(temperature, int | float) and temperature == 0:
        return True
    return "seed" in fields and (temperature is None or isinstance(temperature, int | float))
