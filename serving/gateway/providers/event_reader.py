"""Which whole events of a provider's reply go to the client, and what usage do they tell?"""

from typing import Any

import msgspec

from router import Usage


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    """OpenAI's usage: by the names of chat and completions, or by those of responses."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None


class _Response(msgspec.Struct):
    usage: _Usage | None = None


class _Reply(msgspec.Struct):
    """A whole reply, or the data of one event; errors may be of any form."""

    usage: _Usage | None = None
    choices: list[msgspec.Raw] | None = None
    response: _Response | None = None  # of `response.completed`
    error: Any = None


_decode = msgspec.json.Decoder(_Reply).decode


def event_data(event: bytes) -> bytes:
    """Return what an event bears: its `data:` lines, joined."""
    return b"".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))


class ReplyReader:
    """Cuts a reply into what may be passed on at once and notes its usage.

    Events (`stream`) are passed on whole. So the first can be checked before anything is
    out, and one that the client did not ask for can be left out: the chunk of usage that has
    no choices (`hides_usage`).
    """

    def __init__(self, *, stream: bool, hides_usage: bool) -> None:
        self.usage: Usage | None = None
        self.error: str | None = None  # an error event: what it says
        self.is_complete = not stream  # the last event has come
        self._stream = stream
        self._hides_usage = hides_usage
        self._buffer = b""

    def feed(self, data: bytes) -> bytes:
        """Take in the reply's next bytes. Return what can be passed on now."""
        self._buffer += data
        if not self._stream:
            return b""
        passed = []
        # A blank line ends an event; some services end lines by CRLF.
        *events, self._buffer = self._buffer.replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            if self._is_passed(event):
                passed.append(event + b"\n\n")
        return b"".join(passed)

    def flush(self) -> bytes:
        """Return the rest at the reply's end: of one that is no stream, all of it."""
        rest, self._buffer = self._buffer, b""
        if not self._stream:
            self._note_usage(rest)
        return rest

    def _is_passed(self, event: bytes) -> bool:
        """Whether an event goes to the client; notes what it tells."""
        data = event_data(event)
        if data == b"[DONE]":
            self.is_complete = True
            return True
        # Most events hold a token and nothing to note: they are not parsed.
        if b'"usage"' not in data and b'"error"' not in data:
            return True
        reply = self._note_usage(data)
        if reply is None:
            return True
        if reply.response is not None:
            self.is_complete = True
        has_usage = reply.usage is not None and reply.choices == []
        return not (has_usage and self._hides_usage)

    def _note_usage(self, data: bytes) -> _Reply | None:
        """Note the usage, or the error, in a reply's JSON. Return it; None if it is not JSON."""
        try:
            reply = _decode(data)
        except msgspec.DecodeError:
            return None  # not for us to judge
        usage = reply.usage or (reply.response.usage if reply.response is not None else None)
        if usage is not None:
            details = usage.prompt_tokens_details or usage.input_tokens_details or _Details()
            self.usage = Usage(
                num_prompt_tokens=usage.prompt_tokens or usage.input_tokens or 0,
                num_cached_tokens=details.cached_tokens or 0,
                num_output_tokens=usage.completion_tokens or usage.output_tokens or 0,
            )
        if reply.error:
            self.error = str(
                reply.error.get("message", "") if isinstance(reply.error, dict) else reply.error
            )
        return reply
