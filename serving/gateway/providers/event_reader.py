r"""Has a provider begun to answer, what of its reply goes to the client, and is it whole?

    silent --content--> begun --every choice has its finish_reason--> finished --[DONE]--> complete
      |                   |                                              |
      \------error--------+----------------------------------------------/--> error

Comments, chunks that only name the role, and keep-alive events are no answer: they are held
back until content comes, so that another provider can still be asked. A reply is one for the
client as soon as it has finished: OpenAI's client asks for neither usage nor `[DONE]`.
"""

import re
from typing import Annotated, Any

import msgspec

from router import Usage
from serving.gateway.providers.provider_error import ProviderError, decode_error, read_error

# No reply has more; what a service says is counted against tenants and budgets.
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**40)]


class _Details(msgspec.Struct):
    cached_tokens: _Count | None = None


class _Usage(msgspec.Struct):
    """OpenAI's usage: by the names of chat and completions, or by those of responses."""

    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None


_ERROR_EVENT = re.compile(rb"^event:\s*error\s*$", re.MULTILINE)
# Events of the Responses API by which it ends, and those that come before any content.
_ENDS = frozenset(("response.completed", "response.incomplete"))
_FAILURES = frozenset(("response.failed", "response.cancelled"))
_PREFACES = frozenset(
    (
        "ping",
        "keepalive",
        "response.created",
        "response.queued",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    )
)


def event_data(event: bytes) -> bytes:
    """Return what an event bears: its `data:` lines, joined."""
    if b"\n" not in event and event.startswith(b"data:"):
        return event[5:].strip()
    return b"".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))


class ReplyReader:
    """Cuts a reply into what may be passed on at once and notes what it tells.

    Events (`stream`) are passed on whole. So the first can be checked before anything is
    out, and one that the client did not ask for can be left out: the chunk of usage that has
    no choices (`hides_usage`).
    """

    def __init__(self, *, stream: bool, hides_usage: bool, num_choices: int = 1) -> None:
        """`num_choices`: how many a reply to this request has."""
        self.usage: Usage | None = None
        self.error: ProviderError | None = None
        self.is_complete = False  # the last event has come, or all of a reply that is no stream
        self.has_news = False  # the last bytes held an event, not only a comment
        self._has_begun = False
        self._stream = stream
        self._hides_usage = hides_usage
        self._num_choices = num_choices
        self._finished: set[int] = set()  # choices
        self._held: list[bytes] = []  # events before the first content
        self._buffer = b""

    @property
    def is_whole(self) -> bool:
        """Whether the client has all of the answer, perhaps but for usage and `[DONE]`."""
        return self.is_complete or len(self._finished) >= self._num_choices

    def feed(self, data: bytes) -> bytes:
        """Take in the reply's next bytes. Return what can be passed on now.

        Nothing is, of what follows an error.
        """
        self._buffer += data
        self.has_news = False
        if not self._stream:
            return b""
        # A blank line ends an event; some services end lines by CRLF.
        *events, self._buffer = self._buffer.replace(b"\r\n", b"\n").split(b"\n\n")
        passed = self._held
        for event in events:
            if self._is_passed(event):
                passed.append(event + b"\n\n")
            if self.error is not None:
                break
        if not self._has_begun:
            return b""
        self._held = []
        return b"".join(passed)

    def flush(self) -> bytes:
        """Return the rest at the reply's end: of one that is no stream, all of it."""
        rest = self._buffer
        if self._stream:
            # Some services leave out the last blank line, and some answer with no events at all.
            data = event_data(rest)
            if data == b"[DONE]" or isinstance(_decoded(data), dict):
                return self.feed(b"\n\n")
            self.error = self.error or decode_error(rest)
            return b""
        self._buffer = b""
        fields = _decoded(rest)
        self.error = read_error(fields)
        if self.error is not None or not isinstance(fields, dict):
            return b""
        self._note_usage(fields)
        for choice in _dicts(fields.get("choices")):
            self._note_choice(choice)
        has_answer = any(fields.get(name) for name in ("choices", "data")) or "output" in fields
        if self.error is not None or not has_answer:
            return b""
        self._has_begun = self.is_complete = True
        return rest

    def _is_passed(self, event: bytes) -> bool:
        """Whether an event goes to the client; notes what it tells."""
        if self.is_complete:
            return False
        data = event_data(event)
        if not data:
            return self._has_begun  # a comment: it keeps a connection alive, and says nothing
        self.has_news = True
        if data == b"[DONE]":
            self.is_complete = self._has_begun
            return True
        if self._has_begun and not _is_notable(data):
            return True
        fields = _decoded(data)
        if not isinstance(fields, dict):
            return self._has_begun  # not for us to judge
        self._note_error(event, fields)
        usage_only = self._note_usage(fields) and fields.get("choices") == []
        kind = fields.get("type")
        has_content = isinstance(kind, str) and "choices" not in fields and kind not in _PREFACES
        for choice in _dicts(fields.get("choices")):
            has_content |= self._note_choice(choice)
        if self.error is not None:
            return False
        self._has_begun |= has_content
        self.is_complete |= kind in _ENDS
        return not (usage_only and self._hides_usage)

    def _note_error(self, event: bytes, fields: dict[str, Any]) -> None:
        """Note an error that an event bears, in any of the ways in which services say it."""
        error = read_error(fields)
        if error is None and fields.get("type") in _FAILURES:
            error = read_error(fields.get("response")) or ProviderError(str(fields["type"]))
        if error is None and _ERROR_EVENT.search(event) is not None:
            error = read_error({"error": fields})
        self.error = error

    def _note_choice(self, choice: dict[str, Any]) -> bool:
        """Note whether a choice has ended, and how. Return whether it bears any content."""
        reason = choice.get("finish_reason")
        if reason == "error" or choice.get("error"):
            self.error = read_error(choice) or ProviderError("finish_reason: error")
            return False
        if reason is not None:
            self._finished.add(choice.get("index") or 0)
        delta = choice.get("delta")
        says = isinstance(delta, dict) and any(delta[name] for name in delta if name != "role")
        return says or bool(choice.get("text")) or reason is not None

    def _note_usage(self, fields: dict[str, Any]) -> bool:
        """Note the usage that a reply, or an event, tells. Return whether it tells any."""
        response = fields.get("response")  # of `response.completed`
        told = fields.get("usage") or (
            response.get("usage") if isinstance(response, dict) else None
        )
        try:
            usage = msgspec.convert(told or {}, _Usage, strict=False)
        except msgspec.ValidationError:
            return False  # not for us to judge
        if not told:
            return False
        details = usage.prompt_tokens_details or usage.input_tokens_details or _Details()
        self.usage = Usage(
            num_prompt_tokens=usage.prompt_tokens or usage.input_tokens or 0,
            num_cached_tokens=details.cached_tokens or 0,
            num_output_tokens=usage.completion_tokens or usage.output_tokens or 0,
        )
        return True


def _is_notable(data: bytes) -> bool:
    """Whether an event may hold more than a token. Most do not, and are not parsed.

    Within a token's text a quote has a backslash before it.
    """
    return (
        b'"error"' in data
        or b'"usage":{' in data
        or b'"usage": {' in data
        or b'"finish_reason":"' in data
        or b'"finish_reason": "' in data
        or b'"response.' in data
    )


def _decoded(data: bytes) -> Any:
    """Return what JSON says; None if it is none."""
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError:
        return None


def _dicts(items: Any) -> list[dict[str, Any]]:
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []
