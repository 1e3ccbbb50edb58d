"""How does another provider go on with a chat's reply that one has begun?

Asked for as vLLM has it (`continue_final_message`): the text so far is the last message, which
the model is to go on with. Its events are then made to look like those of the same reply.
"""

from typing import Any

import msgspec

from serving.gateway.providers.event_reader import event_data

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
    """One chat's reply as far as it has come, over all the providers that had it."""

    def __init__(self) -> None:
        self.text = ""
        self.num_tokens = 0  # about: one an event
        self.is_text = True  # nothing else has come so far
        self._shared_fields: dict[str, Any] = {}  # what every event of the reply says
        self._num_earlier_tokens = 0  # of providers before the one that has it now
        self._was_moved = False  # from the provider that began it

    @property
    def num_new_tokens(self) -> int:
        """Tokens of the provider that has it now."""
        return self.num_tokens - self._num_earlier_tokens

    def move_on(self) -> None:
        """Let another provider have it from here on."""
        self._was_moved = True
        self._num_earlier_tokens = self.num_tokens

    def body_for_rest(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the body that asks another provider for the rest."""
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

    def pass_events(self, events: bytes) -> bytes:
        """Take in whole events. Return them as the client is to see them."""
        return b"".join(self._pass_event(event) for event in events.split(b"\n\n") if event)

    def _pass_event(self, event: bytes) -> bytes:
        chunk = _decoded(event)
        if chunk is None:
            return event + b"\n\n"
        content = self._note_chunk(chunk)
        if not self._was_moved:
            if not self._shared_fields:
                names = ("id", "created", "model")
                self._shared_fields = {name: chunk[name] for name in names if name in chunk}
            self._add_text(content)
            return event + b"\n\n"
        chunk |= self._shared_fields
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
                    usage[name] += sign * self._num_earlier_tokens
        self._add_text(content)
        return b"data: " + msgspec.json.encode(chunk) + b"\n\n"

    def _note_chunk(self, chunk: dict[str, Any]) -> str:
        """Note whether a chunk bears more than text. Return its text."""
        content = ""
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            content = delta.get("content") or ""
            others = {name for name, value in delta.items() if value} - {"role", "content"}
            self.is_text = self.is_text and not others
        return content

    def _add_text(self, content: str) -> None:
        self.text += content
        self.num_tokens += bool(content)


def _decoded(event: bytes) -> dict[str, Any] | None:
    """Return the chunk that an event bears; None if it bears something else."""
    try:
        chunk = msgspec.json.decode(event_data(event))
    except msgspec.DecodeError:
        return None
    return chunk if isinstance(chunk, dict) else None
