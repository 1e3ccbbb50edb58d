"""What does an error tell that a provider answers with: of the request, the key, or the provider?

Read from its status and its codes. Its words count only by how they begin: what stands further
on may be the client's own, said back, and a client must not be able to have a key put aside.
"""

import enum
import re
from typing import Any

import msgspec

# Statuses that tell of the request, which any other provider would refuse as well.
_CLIENTS_FAULT = frozenset((400, 413, 415, 422))
# Statuses that the next call under the same key would get, too; so it is with 402, for want of
# money.
_KEYS_FAULT = frozenset((401, 403))
# Codes and types of errors that no waiting helps against, whatever their status: OpenAI's,
# then those of proxies (LiteLLM, one-api) and of other services.
_OUT_OF_MONEY = frozenset(
    (
        "insufficient_quota",
        "billing_hard_limit_reached",
        "billing_not_active",
        "budget_exceeded",
        "budget_exhausted",
        "budgetexceedederror",
        "insufficient_balance",
        "insufficient_credits",
        "insufficient_user_quota",
        "exceeded_current_quota_error",
        "payment_required",
    )
)
# How their messages begin where no code says it: Anthropic (400), LiteLLM (400), DeepSeek (402).
_OUT_OF_MONEY_WORDS = re.compile(
    r"(?:(?:your|the|team|user|key|account|monthly|daily) )*"
    r"(?:(?:budget|credits?|quota)(?: has been| have been| is| are)? (?:exceeded|exhausted)"
    r"|credit balance is too low|insufficient (?:balance|credits?|funds))\b",
    re.IGNORECASE,
)
_TOO_MANY = frozenset(("rate_limit_exceeded", "rate_limit_error", "too_many_requests"))
# A 403 of these is about what the client said (OpenAI, Azure; OpenRouter gives `reasons`).
_FLAGGED = frozenset(("content_filter", "content_policy_violation", "moderation"))


class ErrorCause(enum.Enum):
    """Whose fault an error is, and so what helps."""

    REQUEST = enum.auto()  # others would say the same
    KEY = enum.auto()  # it is not accepted: the next call would get this, too
    MONEY = enum.auto()  # the key has none left: so would it
    RATE = enum.auto()  # too many calls at the moment
    PROVIDER = enum.auto()  # another may do better
    UNKNOWN = enum.auto()  # the provider, or the request by what it does to it


class ProviderError(msgspec.Struct, frozen=True):
    """An error in a provider's own words and codes."""

    message: str = ""
    codes: frozenset[str] = frozenset()  # in lower case: its code, type and status
    is_flagged: bool = False  # the input was found improper

    def cause(self, status: int) -> ErrorCause:
        """Whose fault it is. A status of 200 tells nothing: the error's own code stands for it."""
        statuses = {status} if status != 200 else {int(c) for c in self.codes if c.isdecimal()}
        if 402 in statuses or self.codes & _OUT_OF_MONEY or _OUT_OF_MONEY_WORDS.match(self.message):
            return ErrorCause.MONEY
        if 403 in statuses and self.is_flagged:
            return ErrorCause.REQUEST
        if statuses & _KEYS_FAULT:
            return ErrorCause.KEY
        if 429 in statuses or (status == 200 and self.codes & _TOO_MANY):
            return ErrorCause.RATE
        if status in _CLIENTS_FAULT:
            return ErrorCause.REQUEST
        return ErrorCause.PROVIDER if statuses - {500} else ErrorCause.UNKNOWN


def read_error(fields: Any) -> ProviderError | None:
    """Return the error that decoded JSON bears; None if it bears none."""
    if isinstance(fields, list):  # Gemini's way to answer
        return read_error(fields[0]) if len(fields) == 1 else None
    if not isinstance(fields, dict):
        return None
    error = fields.get("error")
    if not error and "error" in (fields.get("object"), fields.get("type")):
        error = fields  # vLLM's of old, and the Responses API's event
    if not error:
        return None
    if not isinstance(error, dict):
        return ProviderError(str(error))
    codes = {str(error[name]).lower() for name in ("code", "type", "status") if error.get(name)}
    metadata = error.get("metadata")
    has_reasons = isinstance(metadata, dict) and bool(metadata.get("reasons"))
    return ProviderError(
        str(error.get("message") or error.get("code") or error.get("type") or "no reason"),
        frozenset(codes),
        is_flagged=has_reasons or bool(codes & _FLAGGED),
    )


def decode_error(text: bytes) -> ProviderError | None:
    """Return the error that JSON bears; None if it bears none, or is no JSON."""
    try:
        return read_error(msgspec.json.decode(text))
    except msgspec.DecodeError:
        return None
