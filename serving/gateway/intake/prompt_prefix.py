"""What does a prompt begin with that others may begin with, too?

Its JSON text is hashed as it is. Equal prompts that are written differently do not match, but the
hashes only serve a guess. Python's own hash is the cheapest (SipHash: 0.4 µs for 256 bytes; blake2b
takes four times as long). Each process has another key for it, so hashes can be compared within one
gateway only. Prompts of different models or salts share nothing in an engine.
"""

import msgspec

from router.types import PREFIX_BLOCK_TOKENS
from serving.gateway.intake.length.tokens_per_byte import PRIOR_TOKENS_PER_BYTE

BLOCK_BYTES = round(PREFIX_BLOCK_TOKENS / PRIOR_TOKENS_PER_BYTE)
# Longer text than the longest context is refused by vLLM, and need not be hashed. Eight bytes a
# token are more than any prose has.
_MAX_BYTES_PER_TOKEN = 8
# 60 bits are two digits of a Python integer, 64 bits three: 32 bytes for 48, in every hash kept.
_KEPT_BITS = (1 << 60) - 1

_ASSISTANT, _ROLE = b'"assistant"', b'"role"'
_BETWEEN = b" \t\r\n,]"  # two messages, or behind the last one
# How far is looked for what usually stands close by: in white space without end not for ever.
_NEAR_BYTES = 64


class PromptPrefix(msgspec.Struct, frozen=True):
    """Hashes of a prompt's beginnings."""

    hashes: tuple[int, ...] = ()  # of its successive whole blocks, each with all before it
    block_share: float = 0.0  # share of the prompt that each of them covers
    end_hash: int = 0  # of all messages of a chat; 0: it is none
    answered_hash: int = 0  # of the messages before its last answer; 0: there is none
    answered_share: float = 0.0  # share of the prompt up to the end of that answer


def prompt_prefix(
    model: str, salt: str, prompt: bytes, max_tokens: float = float("inf")
) -> PromptPrefix:
    """Return the hashes of a prompt, in JSON, that a model of so long a context may read."""
    root = hash((model, salt)) & _KEPT_BITS
    num_bytes = int(min(len(prompt), max_tokens * _MAX_BYTES_PER_TOKEN))
    hashes = _chain(root, prompt, num_bytes)
    share = BLOCK_BYTES / len(prompt)
    if not prompt.startswith(b"[") or num_bytes < len(prompt):
        return PromptPrefix(hashes, share)
    end_hash = _hash_up_to(_end_of_messages(prompt, len(prompt)), root, prompt, hashes)
    if (answer := _last_answer(prompt)) is None:
        return PromptPrefix(hashes, share, end_hash)
    begin, end = answer
    answered_hash = _hash_up_to(_end_of_messages(prompt, begin), root, prompt, hashes)
    return PromptPrefix(hashes, share, end_hash, answered_hash, end / len(prompt))


def _chain(root: int, prompt: bytes, num_bytes: int) -> tuple[int, ...]:
    chained = root
    hashes = []
    for end in range(BLOCK_BYTES, num_bytes + 1, BLOCK_BYTES):
        chained = hash((chained, prompt[end - BLOCK_BYTES : end])) & _KEPT_BITS
        hashes.append(chained)
    return tuple(hashes)


def _hash_up_to(end: int, root: int, prompt: bytes, hashes: tuple[int, ...]) -> int:
    """Return the hash of a prompt's first bytes; another one than that of any whole block."""
    number = end // BLOCK_BYTES
    before = hashes[number - 1] if number else root
    return hash((before, prompt[number * BLOCK_BYTES : end], end)) & _KEPT_BITS


def _end_of_messages(prompt: bytes, end: int) -> int:
    """Return where the message before `end` ends, without what separates it from the next."""
    near = prompt[max(0, end - _NEAR_BYTES) : end]
    return end - len(near) + len(near.rstrip(_BETWEEN))


def _last_answer(prompt: bytes) -> tuple[int, int] | None:
    """Return where the last message of the assistant begins, and where the next one does."""
    at = prompt.rfind(_ASSISTANT)
    if at < 0 or _ROLE not in prompt[max(0, at - _NEAR_BYTES) : at]:
        return None
    begin = prompt.rfind(b"{", 0, at)
    following = prompt.find(_ROLE, at)
    end = prompt.rfind(b"{", at, following) if following >= 0 else len(prompt)
    return (begin, end) if 0 <= begin < at < end else None
