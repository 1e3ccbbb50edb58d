"""What does a server that is not ours get of a request's body, and what is asked beside?

Fields are added behind the client's own: of two of the same name the last one counts, to Python's
`json` and to ours. So what may be megabytes is copied and not read.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from serving.engine.external.continuation import CHAT, COMPLETIONS, is_just_text

_HEAVY = ("messages", "prompt")


def light_fields(body: bytes) -> dict[str, Any]:
    """Return the fields of a body but for its prompt, of which only the kind is told.

    Empty if it cannot be read: then nothing of it is changed.
    """
    try:
        raw = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        fields = {name: msgspec.json.decode(raw[name]) for name in raw if name not in _HEAVY}
    except msgspec.MsgspecError:
        return {}
    prompt = bytes(raw["prompt"]) if "prompt" in raw else b""
    if prompt[:1] == b'"':
        fields["prompt"] = ""
    elif prompt[:1] == b"[":
        is_ids = prompt[1:].lstrip()[:1].isdigit()
        fields["prompt"] = [0] if is_ids else [""]
    return fields


def with_own_fields(
    path: str,
    body: bytes,
    fields: dict[str, Any],
    model_for: Callable[[object], str | None],
    *,
    wants_ids: bool,
) -> tuple[bytes, bool, bool]:
    """Return the body with what the server is to be asked beside.

    And whether tokens' ids are asked for, and the usage of a stream, which the client has not:
    both are kept from it. `model_for` returns the server's own name of a model.
    """
    added: dict[str, Any] = {}
    asks_ids = hides_usage = False
    if not fields and body[:1] == b"{":  # of another endpoint
        fields = {"model": light_fields(body).get("model")}
    if fields and (name := model_for(fields.get("model"))) is not None:
        added["model"] = name
    if fields.get("priority"):
        added["priority"] = 0  # it has had its turn, and a scheduler without them refuses it
    if fields.get("stream") and path in (CHAT, COMPLETIONS):
        if wants_ids and is_just_text(path, fields):
            if not fields.get("return_token_ids"):
                asks_ids = added["return_token_ids"] = True
        else:
            options = fields.get("stream_options") or {}
            if isinstance(options, dict) and not options.get("include_usage"):
                hides_usage = True
                added["stream_options"] = {**options, "include_usage": True}
    if not added:
        return body, False, False
    end = body.rindex(b"}")
    more = memoryview(msgspec.json.encode(added))[1:]
    return b"".join((memoryview(body)[:end], b",", more)), asks_ids, hides_usage
