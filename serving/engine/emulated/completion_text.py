"""What do engines without a model send? vLLM 0.32's chunks, rendered in advance.

A response's constant parts are rendered once, so that a token costs one concatenation: these
engines share their cores with what is measured.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import msgspec

from serving.stream.accounting import current_accounting

_WORDS = tuple(f" {number}".encode() for number in range(4096))


def _count(number: int) -> bytes:
    return _WORDS[number % len(_WORDS)]


class CompletionText:
    """Renders one choice of a response. `num_prompt_tokens` goes into its usage.

    `word` returns the text of a token, counted from 1, as it appears in JSON.
    """

    def __init__(
        self,
        chat: bool,
        number: int,
        model: str,
        num_prompt_tokens: int,
        *,
        index: int = 0,
        word: Callable[[int], bytes] = _count,
        created_s: int | None = None,
    ) -> None:
        self._chat = chat
        self._index = index
        self._word = word
        self._num_prompt_tokens = num_prompt_tokens
        # Behind a gateway id and time follow from the request, the same on every engine
        # (`serving.engine.vllm.resume`).
        accounting = current_accounting.get()
        name = accounting.request_id if accounting else ""
        self._common = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{name or f'{number:032x}'}",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": created_s or (accounting.created_s if accounting else 0) or int(time.time()),
            "model": model,
        }
        admission = f"data: {json.dumps(self._common, separators=(',', ':'))[:-1]}"
        content = '"delta":{"content":"' if chat else '"text":"'
        close = '"}' if chat else '"'
        self._start = f'{admission},"choices":[{{"index":{index},{content}'.encode()
        self._end = f'{close},"logprobs":null,"finish_reason":null}}]}}\n\n'.encode()
        self._last_end = (
            f'{close},"logprobs":null,"finish_reason":"length","stop_reason":null}}]}}\n\n'
        ).encode()
        self.role = (
            f'{admission},"choices":[{{"index":{index},"delta":{{"role":"assistant","content":""}},'
            '"logprobs":null,"finish_reason":null}]}\n\n'
        ).encode()

    def token(self, number: int, last: bool) -> bytes:
        """Return the event of one token, counted from 1; the last has the finish reason."""
        return self._start + self._word(number) + (self._last_end if last else self._end)

    def _counts(self, num_tokens: int, num_cached_tokens: int) -> dict[str, Any]:
        counts: dict[str, Any] = {
            "prompt_tokens": self._num_prompt_tokens,
            "total_tokens": self._num_prompt_tokens + num_tokens,
            "completion_tokens": num_tokens,
        }
        if num_cached_tokens:
            counts["prompt_tokens_details"] = {"cached_tokens": num_cached_tokens}
        return counts

    def usage(self, num_tokens: int, num_cached_tokens: int = 0) -> bytes:
        """Return the usage event, which ends a stream if requested; counts are of all choices."""
        counts = self._counts(num_tokens, num_cached_tokens)
        event: dict[str, Any] = {**self._common, "choices": [], "usage": counts}
        return b"data: " + msgspec.json.encode(event) + b"\n\n"

    def choice(self, num_tokens: int) -> dict[str, Any]:
        """Return this choice for a response that is not streamed."""
        content = b"".join(map(self._word, range(1, num_tokens + 1))).decode()
        choice: dict[str, Any] = {
            "index": self._index,
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
        if self._chat:
            choice["message"] = {"role": "assistant", "content": content}
        else:
            choice["text"] = content
        return choice

    def whole(
        self,
        num_tokens: int,
        num_cached_tokens: int = 0,
        choices: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Return the body of a response that is not streamed; `choices` defaults to this one."""
        return {
            **self._common,
            "object": "chat.completion" if self._chat else "text_completion",
            "choices": choices or [self.choice(num_tokens)],
            "usage": self._counts(num_tokens, num_cached_tokens),
        }
