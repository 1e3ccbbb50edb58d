"""How do errors look in OpenAI's API?

A fault that vLLM knows has vLLM's `type`, `param` and `code`: programs compare these.
"""

import math
from collections.abc import Sequence

import msgspec

from router import RejectReason
from serving.stream.frames import Headers


class ApiError(Exception):
    """An error reply. `status` is the HTTP status, the rest is OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "BadRequestError",
        param: str | None = None,
        code: str | int | None = None,
        retry_after_s: float | None = None,
        headers: Headers | None = None,
    ) -> None:
        super().__init__(_sayable(message))
        self.status = status
        self.kind = kind
        self.param = None if param is None else _sayable(param)
        self.code = code if code is not None else status
        self.retry_after_s = retry_after_s
        self._headers = headers or []

    def body(self, path: str = "") -> bytes:
        """Return the error object as JSON: OpenAI's, or Anthropic's at a path of its API."""
        if is_anthropic(path):
            return _anthropic_body(self.status, str(self))
        return msgspec.json.encode(
            {
                "error": {
                    "message": str(self),
                    "type": self.kind,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    def reply(self, own_headers: Headers, path: str = "") -> tuple[int, Headers, bytes]:
        """Return status, headers and body of the reply, with what every reply bears."""
        body = self.body(path)
        headers = [*self.headers(), *own_headers, (b"content-length", b"%d" % len(body))]
        if self.status == 413:
            headers.append((b"connection", b"close"))
        return self.status, headers, body

    def headers(self) -> Headers:
        """Return the reply's headers."""
        headers = [(b"content-type", b"application/json"), *self._headers]
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if self.retry_after_s is not None:
            # Whole seconds, rounded up: a client must not come back too early.
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(self.retry_after_s))))
        return headers


def _sayable(text: str) -> str:
    """Return what can be sent: it may quote half a pair of surrogates of the request's."""
    return text.encode(errors="backslashreplace").decode()


# https://docs.anthropic.com/en/api/errors
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def is_anthropic(path: str) -> bool:
    """Whether a path is of Anthropic's API, where errors have its form."""
    return path.startswith("/v1/messages")


def as_anthropic(status: int, body: bytes) -> bytes:
    """Return an error reply of vLLM's in Anthropic's form; as it is if it is none of OpenAI's.

    vLLM itself translates what its Messages API says, but not what is refused before that.
    """
    try:
        error = msgspec.json.decode(body, type=_OpenAiError).error
    except msgspec.MsgspecError:
        return body
    return _anthropic_body(status, error.message)


class _Message(msgspec.Struct):
    message: str


class _OpenAiError(msgspec.Struct):
    error: _Message
    type: msgspec.UnsetType = msgspec.UNSET  # which Anthropic's has


def _anthropic_body(status: int, message: str) -> bytes:
    kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": message}})


def internal_error(name: str) -> ApiError:
    """Return the apology for what nobody expected, under a name that logs bear, too."""
    return ApiError(500, f"Internal server error ({name}).", kind="InternalServerError")


def model_not_found(name: str, usable: Sequence[str] = ()) -> ApiError:
    """Return vLLM's reply to a model that there is none of, or none for this caller."""
    message = f"The model `{name}` does not exist."
    if usable:
        message += f" You may use: {', '.join(usable)}."
    return ApiError(404, message, kind="NotFoundError", param="model")


REMOVED = "was removed from the configuration, and its engines have ended"
UNLOADED = "was unloaded"


def model_gone(name: str, why: str, retry_after_s: float | None = None) -> ApiError:
    """Return the reply to a request for a model that is in the configuration, and serves nobody."""
    return ApiError(
        503,
        f"The model `{name}` {why}.",
        kind="ServiceUnavailableError",
        param="model",
        retry_after_s=retry_after_s,
    )


# Used when no engine runs to predict a time from: about as long as one takes to start.
_RETRY_AFTER_S = 30.0


def rejection_error(reason: RejectReason, retry_after_s: float | None) -> ApiError:
    """Return the reply to a request that the router refused."""
    status, message = {
        RejectReason.QUEUE_FULL: (429, "All engines are busy and the queue is full."),
        RejectReason.EXPIRED: (503, "No engine became free within router.max_hold_s."),
        RejectReason.HOPELESS: (429, "All engines are busy for longer than router.max_hold_s."),
        RejectReason.OVERLOADED: (
            429,
            "More requests come than can be answered in time (router.max_late_s).",
        ),
        RejectReason.UNKNOWN_MODEL: (404, "No engine serves this model."),
        RejectReason.NO_BUDGET: (
            429,
            "Only providers have this model, and their limits (providers.keys, "
            "max_cost_per_request) leave no room.",
        ),
        RejectReason.ENDS_ENGINES: (
            400,
            "Two engines died or hung while they began to work on this request. It is refused, "
            "as is every one of the same body, for router.refuse_s.",
        ),
    }[reason]
    kind = {404: "NotFoundError", 429: "RateLimitError", 503: "ServiceUnavailableError"}.get(
        status, "BadRequestError"
    )
    if status in (429, 503) and retry_after_s is None:
        retry_after_s = _RETRY_AFTER_S
    if reason is RejectReason.UNKNOWN_MODEL:  # vLLM's own fault, in its words for programs
        return ApiError(status, message, kind=kind, param="model")
    return ApiError(status, message, kind=kind, code=reason.value, retry_after_s=retry_after_s)
