"""What does routing need to know of an HTTP body? From a body to a `Request`."""

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from router import EngineInfo, Request, RequestClass, Usage
from router.types import MAX_PREFIX_BLOCKS, PREFIX_BLOCK_TOKENS
from serving.gateway.http.errors import ApiError

# Used until the first replies show better: English text in a byte-pair
# vocabulary has about four bytes per token.
_PRIOR_TOKENS_PER_BYTE = 0.25
# The prior weighs as much as this many bytes of real prompts.
_PRIOR_BYTES = 2_000.0
# Older prompts count less and less: about the last 200 KB of prompt text matter.
_MEMORY_BYTES = 200_000.0
# Prompts are compared by blocks of this size, and only by their first 64 KB.
_BLOCK_BYTES = round(PREFIX_BLOCK_TOKENS / _PRIOR_TOKENS_PER_BYTE)


_ABSENT = msgspec.Raw(b"")


class _Body(msgspec.Struct):
    """Fields common to all endpoints. vLLM checks the others."""

    model: str | None = None
    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    priority_class: RequestClass | None = None  # ours; vLLM ignores it


class _ChatBody(_Body, kw_only=True):
    messages: msgspec.Raw = _ABSENT


class _CompletionBody(_Body, kw_only=True):
    prompt: msgspec.Raw = _ABSENT
    prompt_embeds: Any = None


class _InputBody(_Body, kw_only=True):
    input: msgspec.Raw = _ABSENT


# By path: the body's type, the field that holds the prompt, and the one of vLLM's tasks that an
# engine must support.
ENDPOINTS: dict[str, tuple[type[_Body], str, str]] = {
    "/v1/chat/completions": (_ChatBody, "messages", "generate"),
    "/v1/completions": (_CompletionBody, "prompt", "generate"),
    "/v1/responses": (_InputBody, "input", "generate"),
    "/v1/embeddings": (_InputBody, "input", "embed"),
}

# Not strict, like vLLM's pydantic models: what those convert is not refused here.
_DECODERS = {
    path: msgspec.json.Decoder(body, strict=False) for path, (body, _, _) in ENDPOINTS.items()
}


class RequestParser:
    """Parse bodies and estimate prompt sizes; learn tokens per byte from replies."""

    def __init__(self) -> None:
        self._num_tokens = _PRIOR_TOKENS_PER_BYTE * _PRIOR_BYTES
        self._num_bytes = _PRIOR_BYTES
        self._default_model = ""  # for requests that name none; the engines', if there are any

    @property
    def tokens_per_byte(self) -> float:
        return self._num_tokens / self._num_bytes

    def learn_tokens_per_byte(self, num_text_bytes: int, usage: Usage | None) -> None:
        """Learn from how many tokens a prompt of so many bytes really was."""
        if usage is None or not usage.num_prompt_tokens or not num_text_bytes:
            return
        keep = math.exp(-num_text_bytes / _MEMORY_BYTES)
        self._num_tokens = keep * self._num_tokens + usage.num_prompt_tokens
        self._num_bytes = keep * self._num_bytes + num_text_bytes

    def parse(
        self,
        path: str,
        body: bytes,
        request_id: str,
        engines: dict[str, EngineInfo],
        now_s: float,
        max_hold_s: float,
        *,
        priority_class: RequestClass = RequestClass.STANDARD,
        wants_prefix: bool = False,
        models_elsewhere: Sequence[str] = (),
    ) -> tuple[Request, int]:
        """Return the request, and the bytes of its prompt's text (0 if it is token ids).

        Providers answer for `models_elsewhere`, whatever the engines serve.
        `priority_class` applies to a body that names none. Raise `ApiError` 400
        or 404 for a request that no engine could answer.
        """
        _, prompt_field, task = ENDPOINTS[path]
        try:
            fields = _DECODERS[path].decode(body)
        except msgspec.ValidationError as error:
            raise ApiError(400, f"Invalid request body: {error}") from None
        except msgspec.DecodeError as error:
            raise ApiError(400, f"The request body is not valid JSON: {error}") from None
        model = self._resolve_model(fields.model, engines, task, models_elsewhere)
        prompt = bytes(getattr(fields, prompt_field))
        if prompt in (b"", b"null", b"[]") and not getattr(fields, "prompt_embeds", None):
            raise ApiError(400, f"'{prompt_field}' is missing or empty", param=prompt_field)
        if path == "/v1/chat/completions" and not prompt.startswith(b"["):
            raise ApiError(400, "'messages' must be a list of messages", param="messages")
        num_tokens, num_text_bytes = self._estimate_tokens(prompt)
        infos = [info for info in engines.values() if model in (info.model, *info.aliases)]
        if infos:
            # vLLM refuses longer prompts. Until it has counted them the
            # estimate must not exceed what the model accepts.
            num_tokens = min(num_tokens, max(info.max_model_len for info in infos))
        return (
            Request(
                id=request_id,
                model=model,
                num_prompt_tokens=max(1, num_tokens),
                max_output_tokens=fields.max_completion_tokens or fields.max_tokens,
                num_sequences=max(1, fields.n or 1),
                num_bytes=len(body),
                priority_class=fields.priority_class or priority_class,
                arrival_s=now_s,
                deadline_s=now_s + max_hold_s,
                prefix_hashes=prefix_hashes(model, prompt) if wants_prefix else (),
                prefix_block_share=_BLOCK_BYTES / len(prompt) if prompt else 0.0,
            ),
            num_text_bytes,
        )

    def _estimate_tokens(self, prompt: bytes) -> tuple[int, int]:
        """Return the estimated tokens, and the number of bytes that they were estimated from."""
        if prompt.startswith(b"[") and prompt[:16].lstrip(b"[ \t\r\n")[:1].isdigit():
            return prompt.count(b",") + 1, 0  # token ids: exact
        return round(len(prompt) * self.tokens_per_byte), len(prompt)

    def _resolve_model(
        self,
        name: str | None,
        engines: dict[str, EngineInfo],
        task: str,
        models_elsewhere: Sequence[str],
    ) -> str:
        """Return the model that is asked for; raise `ApiError` if no engine has it."""
        infos = list(engines.values())
        if infos:
            self._default_model = infos[0].model
        if name is None:
            name = self._default_model or next(iter(models_elsewhere), "")
        if not engines or name in models_elsewhere:
            return name  # no engine runs: the request is held, one may start
        serving = [info for info in infos if name in (info.model, *info.aliases)]
        if not serving:
            raise ApiError(
                404,
                f"The model '{name}' does not exist. This server has: "
                + ", ".join(sorted({info.model for info in infos})),
                kind="NotFoundError",
                param="model",
                code="model_not_found",
            )
        if not any(task in info.tasks for info in serving):
            raise ApiError(400, f"The model '{name}' does not support this endpoint ({task}).")
        return name


def prefix_hashes(model: str, prompt: bytes) -> tuple[int, ...]:
    """Return chained hashes of the prompt's whole blocks, of the first 256 at most.

    The JSON text is hashed as it is. Equal prompts that are written differently do not match, but
    the hashes only serve a guess. Python's own hash is the cheapest (64 bits of SipHash: 0.8 µs
    per KB; blake2b takes four times as long). Each process has another key for it, so hashes
    can be compared within one gateway only.
    """
    chained = hash(model)
    hashes = []
    for end in range(
        _BLOCK_BYTES, min(len(prompt), _BLOCK_BYTES * MAX_PREFIX_BLOCKS) + 1, _BLOCK_BYTES
    ):
        chained = hash((chained, prompt[end - _BLOCK_BYTES : end]))
        hashes.append(chained)
    return tuple(hashes)
