"""What is logged of a request? One line, when it is over; its text only if that is asked for.

Requests are collected for a second, or 64 of them; then their lines are made and appended in one
write. A gateway that is killed loses those of its last second. A line takes 9 µs among others, and
42 by itself, when all that makes it has left the processor's caches (Python 3.11, a Xeon). Writing
happens on the event loop; a disk that stalls stalls it, which is why nothing is synced.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from typing import TextIO

import msgspec

from serving.config import LogConfig

logger = logging.getLogger(__name__)

_FLUSH_S = 1.0
_FLUSH_LINES = 64
_FLUSH_BYTES = 1 << 16  # of bodies


class RequestLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request, as its line says. What is not known, or never was, is left out.

    Times are in seconds, from the arrival in the gateway unless said otherwise.
    """

    time: str  # when it was over, in UTC by RFC 3339
    gateway: int  # its rank
    id: str  # the client's own `X-Request-Id`, or the one that it was given
    path: str
    status: int = 0  # of HTTP, as the client got it; none if it left before
    outcome: str  # completed, rejected, expired, reneged or failed
    reason: str = ""  # why it was not completed
    model: str = ""
    route: str = ""  # that chose the model
    why: str = ""  # it did
    tenant: str = ""
    request_class: str = msgspec.field(name="class", default="")
    stream: bool = False
    cache: str = ""  # hit, miss, join or bypass
    engines: tuple[str, ...] = ()  # in the order in which they had it; providers as "provider NAME"
    held_s: float | None = None  # until it was first sent
    predicted_ttft_s: float | None = None  # from when the engine that answered was sent it
    answered_in_s: float | None = None  # from the same to the first token
    ttft_s: float | None = None
    tpot_s: float | None = None  # per token after the first
    total_s: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    trace_id: str = ""
    body: str = ""  # only with `log.bodies`


class RequestLog:
    """A gateway's lines on their way to its file."""

    def __init__(self, config: LogConfig, rank: int) -> None:
        """Open `requests-RANK.log` in the folder, which is made. Raises `OSError`."""
        assert config.dir is not None
        config.dir.mkdir(parents=True, exist_ok=True)
        path = config.dir / f"requests-{rank}.log"
        # Only its file and its way to put one aside: a log record for each line would cost more
        # than all else here.
        self._file = RotatingFileHandler(
            path, maxBytes=config.max_bytes, backupCount=config.num_kept, encoding="utf-8"
        )
        self._max_bytes = config.max_bytes
        self._is_json = config.format == "json"
        self._encode = msgspec.json.Encoder().encode
        self._waiting: list[Callable[[], RequestLine]] = []
        self._num_bytes = 0  # that they keep
        self._timer: asyncio.TimerHandle | None = None
        self._is_closing = False

    def write(self, line: Callable[[], RequestLine], num_bytes: int = 0) -> None:
        """Add a line, made when it is written; it is in the file within a second.

        `num_bytes`: of a body that is kept until then.
        """
        self._waiting.append(line)
        self._num_bytes += num_bytes
        if (
            len(self._waiting) >= _FLUSH_LINES
            or self._num_bytes >= _FLUSH_BYTES
            or self._is_closing
        ):
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_S, self.flush)

    def flush(self) -> None:
        """Write what has been collected. What cannot be written is lost, and that is logged."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._waiting:
            return
        waiting, self._waiting, self._num_bytes = self._waiting, [], 0
        lines = [text for line in waiting if (text := self._text(line)) is not None]
        try:
            if self._stream().tell() >= self._max_bytes:
                self._file.doRollover()
            stream = self._stream()
            stream.write(b"\n".join((*lines, b"")).decode())
            stream.flush()
        except OSError as error:
            logger.error("%d lines of the request log are lost: %s", len(lines), error)

    def _stream(self) -> TextIO:
        """Return the open file. Raise `OSError`."""
        if self._file.stream is None:  # it could not be put aside
            self._file.stream = self._file._open()
        return self._file.stream

    def _text(self, make_line: Callable[[], RequestLine]) -> bytes | None:
        """Return the text of a line; None for one that cannot be made: others have theirs."""
        try:
            line = make_line()
            return self._encode(line) if self._is_json else in_words(line).encode()
        except Exception:
            logger.exception("a line of the request log is lost")
            return None

    def close(self) -> None:
        """Write what is left. What is open still may be over a little later: no line waits then."""
        self._is_closing = True
        self.flush()


_NAMES = tuple((field.encode_name, field.default) for field in msgspec.structs.fields(RequestLine))
_SAID_FIRST = frozenset(("time", "status", "outcome", "path"))
_QUOTED = frozenset(' "=')


def in_words(line: RequestLine) -> str:
    """Return a line for people: when, what came of it, then each field that is known."""
    said = [line.time, str(line.status or "-"), line.outcome, line.path]
    for (name, default), value in zip(_NAMES, msgspec.structs.astuple(line), strict=True):
        if value == default or name in _SAID_FIRST:
            continue
        if isinstance(value, float):
            said.append(f"{name}={value:.4g}")
        elif isinstance(value, int):
            said.append(f"{name}={value}")
        else:
            text = value if isinstance(value, str) else ",".join(value)
            # Whatever clients name stays on its line and within its field.
            plain = text.isprintable() and not _QUOTED.intersection(text)
            said.append(f"{name}={text if plain else msgspec.json.encode(text).decode()}")
    return " ".join(said)


class Clock:
    """Writes times as logs have them. What they have in common is written once per second."""

    def __init__(self) -> None:
        self._second = 0
        self._text = ""

    def text(self, now_s: float) -> str:
        """Return a time, in seconds since the epoch, in UTC by RFC 3339, to the microsecond."""
        second = int(now_s)
        if second != self._second:
            self._second = second
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._text}.{int((now_s - second) * 1e6):06d}Z"
