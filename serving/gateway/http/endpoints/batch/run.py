"""What becomes of one batch, from its validation to its files, in the gateway that runs it?

It begins where the gateway before it was killed: what has an answer in the database is not asked
again, what was under way is.
"""

import asyncio
import logging
import sqlite3
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from serving.config import Config
from serving.gateway.http.endpoints.batch.database import Database
from serving.gateway.http.endpoints.batch.files import Files
from serving.gateway.http.endpoints.batch.lines import (
    Checked,
    answer_line,
    check_file,
    error_line,
    numbered_lines,
    read_line,
    usage_of,
)
from serving.gateway.http.endpoints.batch.objects import Batch, BatchError, BatchUsage
from serving.gateway.http.endpoints.batch.pace import Pace
from serving.gateway.http.endpoints.batch.sending import send_line
from serving.gateway.http.endpoints.batch.store import LEASE_S, BatchStore, Result, write_results
from serving.gateway.http.errors import ApiError
from serving.gateway.request_path import RequestPath

logger = logging.getLogger(__name__)

_READ_LINES, _READ_BYTES = 64, 2**20  # read ahead of what is sent
_FLUSH_S = 0.25  # longest time that an answer waits to be written
_MAX_FAILURES = 3  # of engines under a line, each past the gateway's own attempts
# Engines may be up again at any time; a quota says when.
_MAX_WAIT_S = {429: 60.0, 502: 5.0, 503: 5.0}
_EXPIRED = "This request could not be executed before the completion window expired."
_CANCELLED = "The batch was cancelled before this request was executed."


class Pending(NamedTuple):
    """A line that has no answer yet."""

    number: int
    custom_id: str
    url: str
    body: bytes
    num_failures: int = 0


class Lost(Exception):
    """Another gateway runs the batch now."""


@dataclass(frozen=True, slots=True, eq=False)
class Keeping:
    """Where batches are kept."""

    database: Database
    files: Files
    store: BatchStore


class BatchRun:
    """One batch that this gateway runs. Who feeds it takes lines and has them sent."""

    def __init__(
        self,
        batch: Batch,
        keeping: Keeping,
        config: Config,
        path: RequestPath,
        pace: Pace,
        check_models: Callable[[Batch, Checked], list[BatchError]],
        wake: Callable[[], None],
        num_done: Counter[bool],
    ) -> None:
        """`wake` is called when there may be more to send, or room for it.

        `num_done` counts the lines that have an answer; those with an error under True.
        """
        self.batch = batch
        self.num_open = 0  # lines that are sent
        self._keeping = keeping
        self._config = config
        self._path = path
        self._pace = pace
        self._check_models = check_models
        self._wake = wake
        self._num_done = num_done
        self._lines: Iterator[tuple[int, bytes]] = iter(())
        self._is_read = False
        self._ready: deque[Pending] = deque()
        self._not_before_s = 0.0
        self._sending: set[asyncio.Task[None]] = set()
        self._results: list[Result] = []
        self._usage = BatchUsage()
        self._revoked: ApiError | None = None
        self._changed = asyncio.Event()

    # --- for who feeds it -----------------------------------------------------------

    def next_line(self, now_s: float) -> Pending | None:
        """Return a line to send now, None if there is none now."""
        if now_s < self._not_before_s or not self._ready:
            return None
        line = self._ready.popleft()
        if len(self._ready) < _READ_LINES // 2 and not self._is_read:
            self._changed.set()  # read on
        return line

    def send(self, line: Pending) -> None:
        """Have a line answered."""
        self.num_open += 1
        task = asyncio.ensure_future(self._send(line))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    def take_results(self) -> tuple[list[Result], BatchUsage]:
        """Return what has been answered and not been kept yet."""
        results, usage = self._results, self._usage
        self._results, self._usage = [], BatchUsage()
        return results, usage

    def look_again(self, batch: Batch) -> None:
        """Learn that a client has changed the batch."""
        self.batch = batch
        self._changed.set()

    # --- its way ----------------------------------------------------------------------

    async def run(self) -> None:
        """Bring the batch to its end. Return early if another gateway runs it."""
        main = asyncio.current_task()
        assert main is not None
        lease = asyncio.ensure_future(self._keep_lease(main))
        try:
            await self._run()
        except Lost:
            logger.warning("batch %s is another gateway's now", self.batch.id)
        except FileNotFoundError as error:
            logger.error("batch %s: its file is gone: %s", self.batch.id, error)
            await self._fail([BatchError("invalid_request", "The input file is gone.")])
        finally:
            lease.cancel()
            for task in self._sending:
                task.cancel()

    async def _run(self) -> None:
        if self.batch.status == "validating":
            await self._validate()
        if self.batch.status == "in_progress":
            await self._answer_lines()
        if self._revoked is not None:
            await self._fail([BatchError("invalid_api_key", str(self._revoked))])
        elif self.batch.status == "cancelling":
            await self._end("cancelled", "batch_cancelled", _CANCELLED)
        elif self.batch.status == "in_progress":
            await self._end("expired", "batch_expired", _EXPIRED)
        elif self.batch.status == "finalizing":
            await self._end("completed")

    async def _keep_lease(self, main: asyncio.Task[None]) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 4)
            try:
                await self._ask(self._keeping.store.renew, self.batch.seq)
            except sqlite3.Error:
                logger.exception("the lease of batch %s is not renewed", self.batch.id)
            except Lost:
                logger.warning("batch %s is another gateway's now", self.batch.id)
                main.cancel()
                return

    async def _ask(self, call: Callable[..., Batch | None], *args: object) -> None:
        """Have the store change the batch. Raise `Lost` if that is another one's to do."""
        batch = await self._keeping.database.run(call, *args)
        if batch is None:
            raise Lost
        self.batch = batch
        self._changed.set()

    async def _fail(self, errors: Sequence[BatchError]) -> None:
        await self._ask(self._keeping.store.fail, self.batch.seq, errors)

    async def _validate(self) -> None:
        batch, store = self.batch, self._keeping.store
        checked = await asyncio.to_thread(
            check_file,
            self._keeping.files.path(batch.input_file_id),
            batch.endpoint,
            self._config.batch.max_lines,
            self._config.gateway.max_body_bytes,
        )
        errors = checked.errors or self._check_models(batch, checked)
        if errors:
            await self._fail(errors)
            return
        [model, *others] = checked.models
        await self._ask(store.begin, batch.seq, checked.total, None if others else model or None)

    async def _answer_lines(self) -> None:
        """Return when every line has an answer, or none is to be asked any more."""
        database, store = self._keeping.database, self._keeping.store
        self._open_lines(await database.run(store.answered_lines, self.batch.seq))
        while True:
            is_over = (
                self._revoked is not None
                or self.batch.status != "in_progress"
                or database.clock() >= self.batch.expires_at
            )
            if is_over:
                self._ready.clear()
                for task in self._sending:
                    task.cancel()
                await self._keep_results()
                return
            if len(self._ready) < _READ_LINES // 2 and not self._is_read:
                await asyncio.to_thread(self._read_on)
                self._wake()
            await self._keep_results()
            if self._is_read and not (self._ready or self._sending or self._results):
                if self.batch.completed + self.batch.failed != self.batch.total:
                    raise RuntimeError("lines have no answer")  # it is begun anew, and asks them
                await self._ask(store.begin_finalizing, self.batch.seq)
                return
            self._changed.clear()
            try:
                async with asyncio.timeout(_FLUSH_S):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _keep_results(self) -> None:
        results, usage = self.take_results()
        if results:
            await self._ask(self._keeping.store.record, self.batch.seq, results, usage)

    def _open_lines(self, answered: set[int]) -> None:
        path = self._keeping.files.path(self.batch.input_file_id)
        lines = numbered_lines(path, self._config.gateway.max_body_bytes)
        self._lines = ((number, data) for number, data in lines if number not in answered)

    def _read_on(self) -> None:
        """Read some lines more."""
        num_bytes = 0
        for number, data in self._lines:
            self._ready.append(Pending(number, *read_line(data)))
            num_bytes += len(data)
            if num_bytes >= _READ_BYTES or len(self._ready) >= _READ_LINES:
                return
        self._is_read = True

    async def _send(self, line: Pending) -> None:
        try:
            caller = self._path.tenants.acting_for(self.batch.tenant)
        except ApiError as error:
            self._revoked = error
            self._let_go()
            return
        sent_s = time.monotonic()
        try:
            answer = await send_line(self._path, caller, line.url, line.body)
        finally:
            self._let_go()
        now_s = time.monotonic()
        num_failures = line.num_failures + (answer.status == 502)
        if answer.wait_s is not None and num_failures < _MAX_FAILURES:
            wait_s = min(answer.wait_s, _MAX_WAIT_S[answer.status])
            self._not_before_s = max(self._not_before_s, now_s + wait_s)
            self._ready.appendleft(line._replace(num_failures=num_failures))
            return
        body = answer_line(
            self.batch.id,
            line.number,
            line.custom_id,
            answer.status,
            answer.request_id,
            answer.body,
        )
        self._results.append(Result(line.number, answer.is_error, body))
        self._num_done[answer.is_error] += 1
        if not answer.is_error:
            usage = usage_of(answer.body)
            self._usage.add(usage)
            self._pace.record_line(usage.input_tokens - usage.cached_tokens, now_s - sent_s)

    def _let_go(self) -> None:
        self.num_open -= 1
        self._wake()

    # --- its end ----------------------------------------------------------------------

    async def _end(self, status: str, code: str = "", message: str = "") -> None:
        """Write the files and end the batch. Lines without an answer get this error."""
        keeping, seq = self._keeping, self.batch.seq
        if code and self.batch.in_progress_at is not None:
            self._open_lines(await keeping.database.run(keeping.store.answered_lines, seq))
            while results := await asyncio.to_thread(self._read_unanswered, code, message):
                await self._ask(keeping.store.record, seq, results, BatchUsage())
        outputs, errors = keeping.files.new_path(), keeping.files.new_path()
        try:
            num_outputs, num_errors = await asyncio.to_thread(
                write_results, keeping.database.path, seq, outputs, errors
            )
            await self._ask(
                keeping.store.end,
                seq,
                status,
                outputs if num_outputs else None,
                errors if num_errors else None,
            )
        finally:
            for path in (outputs, errors):
                path.unlink(missing_ok=True)

    def _read_unanswered(self, code: str, message: str) -> list[Result]:
        results = []
        for number, data in self._lines:
            custom_id, _, _ = read_line(data)
            body = error_line(self.batch.id, number, custom_id, code, message)
            results.append(Result(number, True, body))
            if len(results) >= _READ_LINES * 8:
                break
        return results
