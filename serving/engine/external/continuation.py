r"""How does another server go on with a reply that one has begun?

| what is known of the reply                               | asked of the other server           |
|----------------------------------------------------------|-------------------------------------|
| text alone, with the ids of prompt and tokens            | a completion of all these ids: the  |
|                                                          | same tokens, none of them drawn     |
|                                                          | again                               |
| text alone, and it would come again (temperature 0, or a | the request as it was; what the     |
| seed), but the ids are not enough: stop strings, which   | client has is compared with what    |
| hold text back, penalties, or a server without ids       | comes, and cut off                  |
| more than text, several choices, another endpoint        | nothing: the reply cannot go on     |

The client sees the events of one reply: ids, time and model stay those of the first server.
"""

from typing import Any, Literal

import msgspec

from serving.engine.external.events import Event

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

# Fields by which the rest of a reply is not just more tokens after those so far.
_MORE_THAN_TEXT = (
    "tools",
    "functions",
    "logprobs",
    "prompt_logprobs",
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "use_beam_search",
    "echo",
    "suffix",
)
# These work on what the server has generated itself, or hold back text that it has generated.
_WORKS_ON_OUTPUT = (
    "stop",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "bad_words",
    "thinking_token_budget",
)
# Of a chat alone.
_OF_CHATS = (
    "messages",
    "max_completion_tokens",
    "chat_template",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
    "documents",
    "tool_choice",
    "tools",
    "functions",
    "function_call",
    "parallel_tool_calls",
    "response_format",
    "reasoning_effort",
    "include_reasoning",
    "modalities",
    "logprobs",
    "top_logprobs",
    "mm_processor_kwargs",
    "metadata",
    "store",
)
_TEXT_FORMAT = {"type": "text"}

How = Literal["tokens", "again", "no"]


class CannotGoOn(Exception):
    """No server can go on with this reply; the message says why, for people."""


def is_just_text(path: str, body: dict[str, Any]) -> bool:
    """Whether the reply to a request is one text, which comes in events."""
    if path not in (CHAT, COMPLETIONS) or not body.get("stream"):
        return False
    if body.get("n") not in (None, 1) or body.get("best_of") not in (None, 1):
        return False
    if any(
        body.get(name) not in (None, False, [], "") and body.get(name) != _TEXT_FORMAT
        for name in _MORE_THAN_TEXT
    ):
        return False
    prompt = body.get("prompt")
    return path == CHAT or isinstance(prompt, str) or _is_ids(prompt)


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)


class Continuation:
    """One reply as far as it has come, over all the servers that had it."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self.token_ids: list[int] = []
        self.num_tokens = 0  # about, where no ids are told
        self.has_ids = True  # of all tokens so far
        self.is_plain = True  # nothing but text has come
        self.is_finished = False  # its `finish_reason` has come
        self.has_begun = False  # the client has some of it
        self._num_shown_ids = 0  # of the tokens whose text the client has
        self._prompt_ids: bytes | None = None  # JSON
        self._said: dict[str, Any] = {}  # by every event of the reply

    @property
    def text(self) -> str:
        """What the client has."""
        return "".join(self._pieces)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt; 0: unknown."""
        if self._prompt_ids is None:
            return 0
        return self._prompt_ids.count(b",") + 1

    def prompt_ids(self) -> list[int]:
        """Return the ids of the prompt; none if they are not known."""
        return [] if self._prompt_ids is None else msgspec.json.decode(self._prompt_ids)

    def note(self, event: Event) -> int:
        """Take in an event that the client gets. Return how many tokens it bears."""
        self.has_begun = True
        if not self._said and event.id:
            self._said = {"id": event.id, "created": event.created, "model": event.model}
        self._prompt_ids = self._prompt_ids or _ids(event.prompt_token_ids)
        num_new = 0
        for choice in event.choices:
            self._prompt_ids = self._prompt_ids or _ids(choice.prompt_token_ids)
            content = choice.content
            if choice.delta is not None and not choice.delta.is_plain:
                self.is_plain = False
            if choice.index:
                self.is_plain = False
            if choice.token_ids is not None:
                self.token_ids += choice.token_ids
                num_new += len(choice.token_ids)
            elif content:
                self.has_ids = False
                num_new += 1
            if content:
                self._pieces.append(content)
                self._num_shown_ids = len(self.token_ids)
            if choice.finish_reason is not None:
                self.is_finished = True
        self.num_tokens += num_new
        return num_new

    @staticmethod
    def may_go_on(path: str, body: dict[str, Any], mode: str, *, tells_ids: bool) -> bool:
        """Whether a reply that is about to begin will be one with which others can go on."""
        if mode == "off" or not is_just_text(path, body):
            return False
        return _comes_again(body, mode) or (
            mode == "auto" and tells_ids and not _works_on_output(body)
        )

    def how(self, path: str, body: dict[str, Any], mode: str) -> How:
        """Return how another server can go on, as `resume` (`mode`) allows."""
        if mode == "off" or not (self.has_begun and self.is_plain) or not is_just_text(path, body):
            return "no"
        comes_again = _comes_again(body, mode)
        if mode == "greedy" and not comes_again:
            return "no"
        if self.has_ids and self._prompt_ids and not _works_on_output(body):
            return "tokens"
        return "again" if comes_again else "no"

    def cut_to_shown(self) -> None:
        """Forget tokens of which the client has no text yet: they are generated again."""
        self.num_tokens -= len(self.token_ids) - self._num_shown_ids
        del self.token_ids[self._num_shown_ids :]

    def body_for_rest(self, path: str, body: dict[str, Any], max_model_len: int) -> bytes | None:
        """Return the completion that goes on after the tokens so far; None if none is left."""
        assert self._prompt_ids is not None
        prompt = self.prompt_ids() + self.token_ids
        num_done = len(self.token_ids)
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        if limit is None and path == COMPLETIONS:
            limit = 16  # OpenAI's
        left = max_model_len - len(prompt) if limit is None else limit - num_done
        if left <= 0:
            return None
        rest = {name: value for name, value in body.items() if name not in _OF_CHATS}
        rest |= {"prompt": prompt, "max_tokens": left, "return_token_ids": True}
        if min_tokens := body.get("min_tokens"):
            rest["min_tokens"] = max(0, min_tokens - num_done)
        return msgspec.json.encode(rest)

    def as_rest(self, event: bytes, path: str, *, is_completion: bool, num_known: int) -> bytes:
        """Return another server's event as one of this reply.

        `is_completion`: it answers a completion though the client may have asked for a chat.
        `num_known` tokens were in its prompt, and are of the answer.
        """
        chunk = msgspec.json.decode(event[5:], type=dict[str, Any])
        chunk |= self._said
        if is_completion and path == CHAT:
            chunk["object"] = "chat.completion.chunk"
            chunk["choices"] = [_as_chat(choice) for choice in chunk.get("choices") or ()]
        if num_known and (usage := chunk.get("usage")):
            usage["prompt_tokens"] = usage.get("prompt_tokens", 0) - num_known
            usage["completion_tokens"] = usage.get("completion_tokens", 0) + num_known
        return b"data: " + msgspec.json.encode(chunk)

    def end_of_length(self, path: str) -> bytes:
        """Return the event that says that there may be no more tokens."""
        text = {"delta": {"content": ""}} if path == CHAT else {"text": ""}
        choice = {"index": 0, **text, "logprobs": None, "finish_reason": "length"}
        kind = "chat.completion.chunk" if path == CHAT else "text_completion"
        head = {"id": self._said.get("id", ""), "object": kind, **self._said}
        return b"data: " + msgspec.json.encode({**head, "choices": [choice]})


class Overlap:
    """Cuts off a reply that comes again what the client has of it, after comparing."""

    def __init__(self, text: str) -> None:
        self._left = text
        self._is_past = False

    def cut(self, event: bytes) -> bytes:
        """Return what the client lacks of an event, b"" if nothing. Raise `CannotGoOn`."""
        if self._is_past:
            return event
        chunk = msgspec.json.decode(event[5:], type=dict[str, Any])
        is_new = False
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta")
            said = (delta.get("content") if delta is not None else choice.get("text")) or ""
            known = said[: len(self._left)]
            if not self._left.startswith(known):
                raise CannotGoOn("generated again, it differs from what had been sent")
            self._left = self._left[len(known) :]
            rest = said[len(known) :]
            is_last = choice.get("finish_reason") is not None
            if is_last and self._left:
                raise CannotGoOn("generated again, it was shorter than what had been sent")
            is_new |= bool(rest) or is_last
            if delta is not None:
                delta.pop("role", None)
                delta["content"] = rest
            else:
                choice["text"] = rest
        self._is_past = is_new
        return b"data: " + msgspec.json.encode(chunk) if is_new else b""


def _as_chat(choice: dict[str, Any]) -> dict[str, Any]:
    """Return the choice of a completion's event as that of a chat's, in vLLM's order."""
    known = {
        "index": choice.get("index", 0),
        "delta": {"content": choice.get("text") or ""},
        "logprobs": choice.get("logprobs"),
        "finish_reason": choice.get("finish_reason"),
    }
    others = {
        name: value
        for name, value in choice.items()
        if name not in known and name not in ("text", "prompt_token_ids")
    }
    if known["finish_reason"] is None:
        others.pop("stop_reason", None)
    return known | others


def _ids(raw: msgspec.Raw) -> bytes | None:
    ids = bytes(raw)
    return ids if ids.startswith(b"[") and len(ids) > 2 else None


def _comes_again(body: dict[str, Any], mode: str) -> bool:
    """Whether the same request gets the same reply."""
    return body.get("temperature") == 0 or (mode == "auto" and body.get("seed") is not None)


def _works_on_output(body: dict[str, Any]) -> bool:
    if body.get("repetition_penalty") not in (None, 1, 1.0):
        return True
    if body.get("seed") is not None and body.get("temperature") != 0:
        return True
    return any(
        body.get(name) not in (None, 0, 0.0, [], "") for name in _WORKS_ON_OUTPUT if name != "seed"
    )
