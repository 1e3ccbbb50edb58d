"""What does an emulated engine read of an OpenAI request?"""

from typing import Any

import msgspec

from serving.engine.emulated.text import Prompt


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Part(msgspec.Struct):
    text: str = ""


class _Message(msgspec.Struct):
    role: str = ""
    content: str | list[_Part] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Body(msgspec.Struct):
    """The keys that are read. Others are ignored, sampling parameters too: replies are fixed."""

    model: str | None = None
    prompt: str | list[int] | None = None
    messages: list[_Message] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    ignore_eos: bool = False  # replies end only at the limit anyhow
    continue_final_message: bool = False
    priority: int = 0
    cache_salt: str | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def parse_prompt(self, chat: bool) -> Prompt:
        """Return the prompt, a chat's by a plain template. Raises `ValueError` if there is none."""
        if not chat:
            if not self.prompt:
                raise ValueError("'prompt' is missing or empty")
            if isinstance(self.prompt, str):
                return Prompt.of_text(self.prompt)
            return Prompt(self.prompt)
        if not self.messages:
            raise ValueError("'messages' is missing or empty")
        turns = [f"<{message.role}> {message.text}" for message in self.messages]
        if not self.continue_final_message:
            turns.append("<assistant>")
        return Prompt.of_text("\n".join(turns))


_decode = msgspec.json.Decoder(Body, strict=False).decode


def parse(body: bytes) -> Body:
    """Return the request. Raises `ValueError` if it is not valid."""
    try:
        request = _decode(body)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from None
    limits: dict[str, Any] = {
        "max_tokens": request.max_tokens,
        "max_completion_tokens": request.max_completion_tokens,
        "n": request.n,
    }
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return request
