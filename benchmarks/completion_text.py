"""What the stand-in engine writes: vLLM 0.32's chunks, rendered ahead.

A response's constant parts are rendered once, so that a token costs one
concatenation: the stand-in shares its cores with what is measured.
"""

import json
import time
from typing import Any

import msgspec

_WORDS = tuple(f" {number}".encode() for number in range(4096))


class CompletionText:
    """The parts of one response. `num_prompt_tokens` goes into its usage."""

    def __init__(self, chat: bool, number: int, model: str, num_prompt_tokens: int) -> None:
        self._chat = chat
        self._num_prompt_tokens = num_prompt_tokens
        self._common = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{number:032x}",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        opening = f"data: {json.dumps(self._common, separators=(',', ':'))[:-1]}"
        content = '"delta":{"content":"' if chat else '"text":"'
        close = '"}' if chat else '"'
        self._start = f'{opening},"choices":[{{"index":0,{content}'.encode()
        self._end = f'{close},"logprobs":null,"finish_reason":null}}]}}\n\n'.encode()
        self._last_end = (
            f'{close},"logprobs":null,"finish_reason":"length","stop_reason":null}}]}}\n\n'
        ).encode()
        self.role = (
            f'{opening},"choices":[{{"index":0,"delta":{{"role":"assistant","content":""}},'
            '"logprobs":null,"finish_reason":null}]}\n\n'
        ).encode()

    def token(self, number: int, last: bool) -> bytes:
        """The event of one token, counted from 1; the last bears the finish reason."""
        word = _WORDS[number % len(_WORDS)]
        return self._start + word + (self._last_end if last else self._end)

    def _counts(self, num_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "total_tokens": self._num_prompt_tokens + num_tokens,
            "completion_tokens": num_tokens,
        }

    def usage(self, num_tokens: int) -> bytes:
        """The event that ends a stream whose client asked for usage."""
        event = {**self._common, "choices": [], "usage": self._counts(num_tokens)}
        return b"data: " + msgspec.json.encode(event) + b"\n\n"

    def whole(self, num_tokens: int) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        content = "".join(
            _WORDS[number % len(_WORDS)].decode() for number in range(1, num_tokens + 1)
        )
        choice = {"index": 0, "logprobs": None, "finish_reason": "length", "stop_reason": None}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": content}
        else:
            choice["text"] = content
        return {
            **self._common,
            "object": "chat.completion" if self._chat else "text_completion",
            "choices": [choice],
            "usage": self._counts(num_tokens),
        }
