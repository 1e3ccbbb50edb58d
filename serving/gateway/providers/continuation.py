"""A chat's reply as far as it has come, so that another service can go on with it."""

from typing import Any

import msgspec

# Fields of a request by which the rest of a reply is not just more text of the same, or
# by which it would be begun anew: vLLM's structured output, for one.
_NOT_JUST_TEXT = (
    "tools",
    "functions",
    "logprobs",
    "response_format",
    "structured_outputs",
    "return_token_ids",
    "stream_interval",
)
_LIMITS = ("max_tokens", "max_completion_tokens")


def can_continue(path: str, body: dict[str, Any]) -> bool:
    """Whether the reply to a request is one text that comes in events."""
    return (
        path == "/v1/chat/completions"
        and bool(body.get("stream"))
        and body.get("n") in (None, 1)
        and not any(body.get(field) for field in _NOT_JUST_TEXT)
    )


class Continuation:
    """Notes the text of one service's events, and makes those of the next parts of the same reply.

    Asked for as vLLM has it (`continue_final_message`): the text so far is the last
    message, which the model is to go on with.
    """

    def __init__(self) -> None:
        self.text = ""
        self.num_tokens = 0  # about: an event each
        self.is_text = True  # nothing else has come so far
        self.has_finished = False  # its last token has come
        self._alike: dict[str, Any] = {}  # what every event of the reply says
        self._num_moved_tokens = 0  # that services before this one have said
        self._has_moved = False

    @property
    def num_new_tokens(self) -> int:
        """Those of the service that has it now."""
        return self.num_tokens - self._num_moved_tokens

    def move(self) -> None:
        """Another service goes on."""
        self._has_moved = True
        self._num_moved_tokens = self.num_tokens

    def body(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return what to ask another service for the rest."""
        said = {"role": "assistant", "content": self.text}
        limits = {
            name: max(1, body[name] - self.num_tokens)
            for name in _LIMITS
            if isinstance(body.get(name), int)
        }
        return {
            **body,
            **limits,
            "messages": [*body["messages"], said],
            "continue_final_message": True,
            "add_generation_prompt": False,
        }

    def take(self, events: bytes) -> bytes:
        """Note whole events, and return them as the client is to see them."""
        return b"".join(self._take(event) for event in events.split(b"\n\n") if event)

    def _take(self, event: bytes) -> bytes:
        chunk = _decoded(event)
        if chunk is None:
            return event + b"\n\n"
        content = self._note(chunk)
        if not self._has_moved:
            if not self._alike:
                names = ("id", "created", "model")
                self._alike = {name: chunk[name] for name in names if name in chunk}
            self._add(content)
            return event + b"\n\n"
        chunk |= self._alike
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            delta.pop("role", None)  # it has been said
            # Some templates trim the last message, so that the blanks at its end come again.
            if content and (blanks := self.text[len(self.text.rstrip()) :]):
                content = delta["content"] = content.removeprefix(blanks)
            if not content and choice.get("finish_reason") is None:
                return b""
        if (usage := chunk.get("usage")) is not None:
            for name, sign in (("prompt_tokens", -1), ("completion_tokens", 1)):
                if name in usage:
                    usage[name] += sign * self._num_moved_tokens
        self._add(content)
        return b"data: " + msgspec.json.encode(chunk) + b"\n\n"

    def _note(self, chunk: dict[str, Any]) -> str:
        """Return the text of a chunk."""
        content = ""
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            content = delta.get("content") or ""
            others = {name for name, value in delta.items() if value} - {"role", "content"}
            self.is_text = self.is_text and not others
            self.has_finished = self.has_finished or choice.get("finish_reason") is not None
        return content

    def _add(self, content: str) -> None:
        self.text += content
        self.num_tokens += bool(content)


def _decoded(event: bytes) -> dict[str, Any] | None:
    """The chunk that an event bears; None if it bears something else."""
    data = b"".join(line[5:] for line in event.split(b"\n") if line.startswith(b"data:"))
    try:
        chunk = msgspec.json.decode(data)
    except msgspec.DecodeError:
        return None
    return chunk if isinstance(chunk, dict) else None
