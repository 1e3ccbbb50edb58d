"""What came back for a question? A client that keeps the whole reply, to compare it later."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

_TIMEOUT = httpx.Timeout(30.0, read=400.0)  # a reply may wait until an engine has restarted


@dataclass(frozen=True)
class Question:
    """What to ask, in which form, and for how many tokens."""

    text: str
    num_tokens: int  # at most
    is_chat: bool = True
    is_streamed: bool = True
    ends_early: bool = False  # when the model ends it; else it always runs to `num_tokens`
    user: str = ""  # who asks; it makes a body of its own of the same question

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"

    def body(self, model: str) -> dict[str, Any]:
        """Return the body of a greedy request."""
        message = {"role": "user", "content": self.text}
        body: dict[str, Any] = {
            "model": model,
            **({"messages": [message]} if self.is_chat else {"prompt": self.text}),
            "temperature": 0,
            "max_tokens": self.num_tokens,
            "ignore_eos": not self.ends_early,
            "return_token_ids": True,
        }
        if self.user:
            body["user"] = self.user
        if self.is_streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body


@dataclass
class Reply:
    """What came back for one question. `error` is empty for a complete reply."""

    question: Question
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)  # when each chunk came, by `time.monotonic`
    response_ids: set[str] = field(default_factory=set)
    dates: set[int] = field(default_factory=set)
    finish_reasons: list[str] = field(default_factory=list)
    usages: list[dict[str, int]] = field(default_factory=list)
    error: str = ""

    def fault(self) -> str:
        """Return what is wrong with the reply by itself, in words; empty if nothing."""
        if self.error:
            return self.error
        num_tokens = len(self.token_ids)
        is_early = self.question.ends_early and num_tokens < self.question.num_tokens
        if num_tokens != self.question.num_tokens and not is_early:
            return f"{num_tokens} tokens instead of {self.question.num_tokens}"
        if len(self.response_ids) != 1 or len(self.dates) != 1:
            return "more than one id or date"
        # The model may end the text with the very last token.
        if self.finish_reasons != ["length"] and not (
            self.question.ends_early and self.finish_reasons == ["stop"]
        ):
            return f"finish reasons {self.finish_reasons}"
        if [usage["completion_tokens"] for usage in self.usages] != [num_tokens]:
            return f"usages {self.usages}"
        return ""


async def send_question(http: httpx.AsyncClient, model: str, question: Question) -> Reply:
    """Send the question and return the reply, however it ended."""
    reply = Reply(question)
    is_done = not question.is_streamed
    try:
        async with http.stream(
            "POST", question.path, json=question.body(model), timeout=_TIMEOUT
        ) as response:
            if response.status_code != 200:
                reply.error = f"HTTP {response.status_code}: {(await response.aread())[:300]!r}"
                return reply
            if not question.is_streamed:
                _add_event(reply, json.loads(await response.aread()))
                return reply
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    is_done = True
                elif line.startswith("data: "):
                    _add_event(reply, json.loads(line[6:]))
    except (httpx.HTTPError, ValueError) as error:
        reply.error = f"{type(error).__name__}: {error}"
    if not reply.error and not is_done:
        reply.error = "no [DONE]"
    return reply


def _add_event(reply: Reply, event: dict[str, Any]) -> None:
    if "error" in event:
        reply.error = str(event["error"])
        return
    reply.response_ids.add(event["id"])
    reply.dates.add(event["created"])
    reply.prompt_ids = event.get("prompt_token_ids") or reply.prompt_ids
    if event.get("usage"):
        reply.usages.append(event["usage"])
    for choice in event["choices"]:
        reply.times_s.append(time.monotonic())
        said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        reply.text += said.get("content") or ""
        reply.token_ids += choice.get("token_ids") or []
        reply.prompt_ids = choice.get("prompt_token_ids") or reply.prompt_ids
        if choice["finish_reason"]:
            reply.finish_reasons.append(choice["finish_reason"])
