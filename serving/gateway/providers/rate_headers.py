"""What do the headers of a provider's reply say of its limits?"""

import email.utils
import re
import time
from collections.abc import Mapping

from router.limits.rate_limit import RateReport

# OpenAI's names, which most compatible services use, then Anthropic's.
_NAMES = {
    "limit_requests": ("x-ratelimit-limit-requests", "anthropic-ratelimit-requests-limit"),
    "remaining_requests": (
        "x-ratelimit-remaining-requests",
        "anthropic-ratelimit-requests-remaining",
    ),
    "limit_tokens": ("x-ratelimit-limit-tokens", "anthropic-ratelimit-tokens-limit"),
    "remaining_tokens": ("x-ratelimit-remaining-tokens", "anthropic-ratelimit-tokens-remaining"),
}
_NUMBER = re.compile(r"[0-9]{1,15}")
_MAX_WAIT_S = 3600.0  # however long a provider says: after this it is asked again


def rate_report(headers: Mapping[str, str]) -> RateReport:
    """Return what the headers, by lower-case name, say; None for what they do not."""
    numbers: dict[str, int | None] = {}
    for field, names in _NAMES.items():
        texts = [headers[name] for name in names if name in headers]
        numbers[field] = int(texts[0]) if texts and _NUMBER.fullmatch(texts[0]) else None
    return RateReport(**numbers, retry_after_s=_retry_after_s(headers))


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds of `retry-after-ms` (OpenAI) or `Retry-After` (RFC 9110, 10.2.3: or a date)."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name, "")
        try:
            wait_s = float(text) * unit_s
        except ValueError:
            continue
        return min(_MAX_WAIT_S, max(0.0, wait_s)) if wait_s == wait_s else None
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except ValueError:
        return None
    return min(_MAX_WAIT_S, max(0.0, date.timestamp() - time.time()))
