r"""What are a file and a batch? As they are kept, and as OpenAI's clients read them.

    validating --> in_progress --> finalizing --> completed
        |               |\--its window is over--> expired
        |               \--cancelled by its owner--> cancelling --> cancelled
        \--a line is wrong--> failed

A batch that is cancelled while it is validated goes the same way to `cancelled`. What never
happens: a batch that leaves one of its last four states, or a line that is answered twice in them.
"""

import re
from typing import Any

import msgspec

from serving.gateway.http.errors import ApiError

OPEN = ("validating", "in_progress", "finalizing", "cancelling")
_WINDOW = re.compile(r"([1-9]\d{0,3})([mhd])")
_S_PER_UNIT = {"m": 60, "h": 3600, "d": 86_400}
_MAX_WINDOW_S = 30 * 86_400
# OpenAI's bounds of metadata.
_MAX_PAIRS, _MAX_NAME, _MAX_VALUE = 16, 64, 512
MAX_ERRORS = 100  # that a batch tells of


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file: an upload, or what became of a batch."""

    seq: int  # in the order of creation
    id: str
    tenant: str
    bytes: int
    created_at: int  # seconds since the epoch, as everywhere here
    expires_at: int
    filename: str
    purpose: str  # "batch" or "batch_output"

    def to_api(self) -> dict[str, Any]:
        """Return OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class BatchError(msgspec.Struct, frozen=True, omit_defaults=False):
    """Why a batch failed: what is wrong with a line, or with all of it."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None  # from 1


class BatchUsage(msgspec.Struct):
    """Tokens that the answers so far took."""

    input_tokens: int = 0
    cached_tokens: int = 0  # of these
    output_tokens: int = 0
    reasoning_tokens: int = 0  # of these

    def add(self, other: "BatchUsage") -> None:
        """Count what another took, too."""
        self.input_tokens += other.input_tokens
        self.cached_tokens += other.cached_tokens
        self.output_tokens += other.output_tokens
        self.reasoning_tokens += other.reasoning_tokens


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch, as it is kept."""

    seq: int  # in the order of creation
    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: dict[str, str] | None
    output_keep_s: int | None  # the client's own; None: as configured
    status: str
    created_at: int
    expires_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    model: str | None = None  # of its requests; None: not known yet, or several
    errors: list[BatchError] | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    usage: BatchUsage = msgspec.field(default_factory=BatchUsage)
    output_file_id: str | None = None
    error_file_id: str | None = None

    def to_api(self) -> dict[str, Any]:
        """Return OpenAI's batch object."""
        errors = None
        if self.errors is not None:
            errors = {"object": "list", "data": [msgspec.to_builtins(e) for e in self.errors]}
        usage = self.usage
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": errors,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "in_progress_at": self.in_progress_at,
            "expires_at": self.expires_at,
            "finalizing_at": self.finalizing_at,
            "completed_at": self.completed_at,
            "failed_at": self.failed_at,
            "expired_at": self.expired_at,
            "cancelling_at": self.cancelling_at,
            "cancelled_at": self.cancelled_at,
            "request_counts": {
                "total": self.total,
                "completed": self.completed,
                "failed": self.failed,
            },
            "usage": {
                "input_tokens": usage.input_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.output_tokens,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
                "total_tokens": usage.input_tokens + usage.output_tokens,
            },
            "metadata": self.metadata,
        }


class BatchesState(msgspec.Struct, frozen=True, kw_only=True):
    """The batches that a gateway runs; nothing where there is no folder for them."""

    num_running: int = 0
    num_open_lines: int = 0  # sent, and not answered yet
    num_allowed_lines: int = 0  # that may be open, for now
    is_busy: bool = False  # others have requests open, or had lately
    is_full: bool = False  # batch.max_bytes is reached: nothing is sent
    num_completed_lines: int = 0  # since the gateway started
    num_failed_lines: int = 0


def window_s(text: Any) -> int:
    """Return a completion window in seconds. Raise `ApiError` 400 for what is none.

    OpenAI knows `24h` alone; here any number of minutes, hours or days does, up to 30 days.
    """
    match = _WINDOW.fullmatch(text) if isinstance(text, str) else None
    seconds = int(match[1]) * _S_PER_UNIT[match[2]] if match else 0
    if not 0 < seconds <= _MAX_WINDOW_S:
        raise ApiError(
            400,
            f"Invalid value: {text!r}. 'completion_window' has to be e.g. '24h', at most '30d'.",
            kind="invalid_request_error",
            param="completion_window",
        )
    return seconds


def read_metadata(value: Any) -> dict[str, str] | None:
    """Return a batch's metadata. Raise `ApiError` 400 for more than OpenAI takes."""
    if value is None:
        return None
    is_right = isinstance(value, dict) and len(value) <= _MAX_PAIRS
    if not is_right or any(
        not isinstance(text, str) or len(name) > _MAX_NAME or len(text) > _MAX_VALUE
        for name, text in value.items()
    ):
        raise ApiError(
            400,
            f"Invalid 'metadata': at most {_MAX_PAIRS} pairs of strings, of up to {_MAX_NAME} and "
            f"{_MAX_VALUE} characters.",
            kind="invalid_request_error",
            param="metadata",
        )
    return value
