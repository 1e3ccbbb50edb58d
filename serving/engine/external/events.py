"""What do the events of a streamed reply say, and what of them goes to the client?

Tokens' ids were asked for by us (`continuation`), so they are taken out again: what is left is,
byte for byte, what the client would have got from the server itself.
"""

import re
from typing import Any

import msgspec

# In JSON a quote within a text has a backslash before it: these are keys wherever they stand.
_IDS = re.compile(rb'"((?:prompt_)?token_ids)":\[[^\]]*\]')
DONE = b"data: [DONE]"
_ABSENT = msgspec.Raw()
_NULLS = (b"", b"null")


class Delta(msgspec.Struct):
    """What a chat's event adds. Anything but text makes it more than text."""

    content: str | None = None
    reasoning: Any = None
    reasoning_content: Any = None
    tool_calls: Any = None
    function_call: Any = None
    refusal: Any = None
    audio: Any = None

    @property
    def is_plain(self) -> bool:
        return not (
            self.reasoning
            or self.reasoning_content
            or self.tool_calls
            or self.function_call
            or self.refusal
            or self.audio
        )


class Choice(msgspec.Struct):
    index: int = 0
    delta: Delta | None = None
    text: str | None = None  # of a completion
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: msgspec.Raw = _ABSENT  # of a completion

    @property
    def content(self) -> str:
        """The text that it adds."""
        return (self.delta.content if self.delta is not None else self.text) or ""


class Details(msgspec.Struct):
    cached_tokens: int | None = None


class UsageFields(msgspec.Struct):
    """OpenAI's usage, by the names of chats and completions or by those of responses."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens_details: Details | None = None


class Event(msgspec.Struct):
    """One event of a chat or a completion, as far as we read it."""

    id: str = ""
    created: int = 0
    model: str = ""
    choices: list[Choice] = []
    usage: UsageFields | None = None
    prompt_token_ids: msgspec.Raw = _ABSENT  # of a chat, in its first event
    error: msgspec.Raw = _ABSENT

    @property
    def error_text(self) -> bytes:
        """The error that it bears, as JSON; b"" if none."""
        return b"" if (text := bytes(self.error)) in _NULLS else text


class Reply(msgspec.Struct):
    """A whole reply, of which only this is read."""

    usage: UsageFields | None = None


_decode_event = msgspec.json.Decoder(Event).decode
_decode_reply = msgspec.json.Decoder(Reply).decode


def decode_event(event: bytes) -> Event | None:
    """Return what an event says; None if it is none of a chat or a completion."""
    if not event.startswith(b"data:"):
        return None
    try:
        return _decode_event(event[5:])
    except msgspec.MsgspecError:
        return None


def usage_of(body: bytes) -> UsageFields | None:
    """Return the usage that a whole reply tells."""
    try:
        return _decode_reply(body).usage
    except msgspec.MsgspecError:
        return None


def without_ids(event: bytes) -> bytes:
    """Return an event as it is where nobody has asked for tokens' ids."""
    return _IDS.sub(rb'"\1":null', event)


class EventCutter:
    """Cuts bytes into events, each without the blank line that ends it."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the events that are whole now."""
        if self._rest:
            data = self._rest + data
        if b"\r" in data:  # some services end lines so
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = data.split(b"\n\n")
        return [event for event in events if event]

    def flush(self) -> list[bytes]:
        """Return what is left at the end; some services leave the last blank line out."""
        rest, self._rest = self._rest.strip(b"\n"), b""
        return [rest] if rest else []


def is_empty(event: Event) -> bool:
    """Whether an event adds nothing, as vLLM sends them only where ids are told."""
    return bool(event.choices) and all(
        choice.delta is not None
        and choice.delta.content is None
        and choice.delta.is_plain
        and choice.finish_reason is None
        and choice.token_ids is not None
        for choice in event.choices
    )


def code_of(error: bytes) -> int:
    """Return the status that an error says, 500 if none."""
    try:
        code = msgspec.json.decode(error, type=dict[str, Any]).get("code")
    except msgspec.MsgspecError:
        return 500
    return code if isinstance(code, int) and 400 <= code <= 599 else 500
