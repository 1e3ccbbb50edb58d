"""Which batches does this gateway run, and when is the next line sent?"""

import asyncio
import contextlib
import logging
import os
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence

from router import RequestClass
from serving.config import Config
from serving.gateway.http.endpoints.batch.database import Database
from serving.gateway.http.endpoints.batch.files import Files
from serving.gateway.http.endpoints.batch.lines import Checked
from serving.gateway.http.endpoints.batch.objects import OPEN, Batch, BatchError, BatchesState
from serving.gateway.http.endpoints.batch.pace import Pace
from serving.gateway.http.endpoints.batch.run import BatchRun, Keeping
from serving.gateway.http.endpoints.batch.store import BatchStore
from serving.gateway.http.errors import ApiError
from serving.gateway.request_path import RequestPath

logger = logging.getLogger(__name__)

_MAX_RUNNING = 32  # batches of this gateway; more wait for one of them
_LOOK_S = 1.0  # for batches that nobody runs
PACE_S = 0.25
_AGAIN_S = 5.0  # until a batch that our own code, or the disk, has failed is tried again
_REMOVE_S = 600.0
_LINES_AT_ONCE = 8  # sent in one turn of the event loop: to read one takes 0.1 ms


class Batches:
    """Runs batches; made where there is a folder for them. Create it on the running loop."""

    def __init__(
        self, config: Config, gateway_id: str, path: RequestPath, served_names: Sequence[str] = ()
    ) -> None:
        """Raise `ConfigError` where the folder cannot be used."""
        assert config.batch.dir is not None
        self._config = config
        self._path = path
        self._served_names = served_names
        self._database = Database(config.batch.dir)
        files = Files(config.batch, self._database)
        owner = f"{gateway_id} {os.getpid()} {secrets.token_hex(8)}"
        self.keeping = Keeping(self._database, files, BatchStore(self._database, files, owner))
        self._pace = Pace(config.batch.max_inflight, config.batch.max_slowdown)
        self._runs: dict[str, BatchRun] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._num_feeders = 1
        self._turn = 0  # of the batches, which is next
        self._is_full = False
        self._has_more, self._is_new = asyncio.Event(), asyncio.Event()
        self._done = Counter[bool]()  # lines of batches that are over here
        self._loops = [
            asyncio.ensure_future(self._claim()),
            asyncio.ensure_future(self._feed()),
            asyncio.ensure_future(self._remove_old()),
        ]

    def close(self) -> None:
        """Stop, keep what has been answered, and let other gateways go on."""
        for task in (*self._loops, *self._tasks.values()):
            task.cancel()
        unkept = [(run.batch.seq, *run.take_results()) for run in self._runs.values()]

        def leave() -> None:
            for seq, results, usage in unkept:
                if results:
                    self.keeping.store.record(seq, results, usage)
            self.keeping.store.release()

        self._database.close(leave)

    def state(self) -> BatchesState:
        """Return what runs, and what has been done."""
        return BatchesState(
            num_running=len(self._runs),
            num_open_lines=self._num_open,
            num_allowed_lines=self._pace.limit,
            is_busy=self._pace.is_busy,
            is_full=self._is_full,
            num_completed_lines=self._done[False],
            num_failed_lines=self._done[True],
        )

    @property
    def _num_open(self) -> int:
        return sum(run.num_open for run in self._runs.values())

    def on_new(self) -> None:
        """Look now for batches to run."""
        self._is_new.set()

    def on_changed(self, batch: Batch) -> None:
        """Learn that a client has changed a batch, which another gateway may run."""
        if (run := self._runs.get(batch.id)) is not None:
            run.look_again(batch)

    # --- which batches ----------------------------------------------------------------

    async def _claim(self) -> None:
        """Take batches that nobody runs, for ever."""
        while True:
            try:
                while len(self._runs) < _MAX_RUNNING and await self._claim_one():
                    pass
                if self._runs:
                    store, files = self.keeping.store, self.keeping.files
                    self._num_feeders = await self._database.run(store.num_owners)
                    self._is_full = not await self._database.run(files.make_room, 0)
            except (sqlite3.Error, OSError):
                logger.exception("batches cannot be looked for")
            self._is_new.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._is_new.wait()

    async def _claim_one(self) -> bool:
        running = Counter(run.batch.tenant for run in self._runs.values())
        batch = await self._database.run(self.keeping.store.claim, running)
        if batch is None:
            return False
        run = BatchRun(
            batch,
            self.keeping,
            self._config,
            self._path,
            self._pace,
            self._check_models,
            self._has_more.set,
            self._done,
        )
        self._runs[batch.id] = run
        self._tasks[batch.id] = asyncio.ensure_future(self._run(run))
        return True

    async def _run(self, run: BatchRun) -> None:
        batch_id = run.batch.id
        try:
            await run.run()
            if run.batch.status not in OPEN:
                logger.info("batch %s is %s", batch_id, run.batch.status)
        except Exception:
            logger.exception("batch %s is interrupted, and goes on soon", batch_id)
            await asyncio.sleep(_AGAIN_S)
            with contextlib.suppress(sqlite3.Error):
                await self._database.run(self.keeping.store.release, run.batch.seq)
        finally:
            del self._runs[batch_id], self._tasks[batch_id]
            self._is_new.set()

    def _check_models(self, batch: Batch, checked: Checked) -> list[BatchError]:
        """Return which models of a batch there are not, or not for its tenant."""
        infos = self._path.driver.engines.infos.values()
        known = {name for info in infos for name in (info.model, *info.aliases)}
        known |= {*self._served_names, *self._path.providers.models}
        if not known:
            return []  # before the first engine has told its names any may be right
        try:
            caller = self._path.tenants.acting_for(batch.tenant)
        except ApiError as error:
            return [BatchError("invalid_api_key", str(error))]
        if caller is not None:
            known = {name for name in known if caller.tenant.may_use((name,))}
        known.update(self._path.request_parser.route_names)
        return [
            BatchError("model_not_found", f"The model '{model}' does not exist.", "model", line)
            for model, line in checked.models.items()
            if model and model not in known
        ]

    # --- which lines ------------------------------------------------------------------

    async def _feed(self) -> None:
        """Send lines as there is room for them, for ever."""
        look_s = 0.0
        while True:
            self._has_more.clear()
            now_s = time.monotonic()
            if self._runs and now_s >= look_s:
                look_s = now_s + PACE_S
                self._look(now_s)
            if not self._is_full and self._send_some(now_s):
                await asyncio.sleep(0)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PACE_S if self._runs else _LOOK_S):
                    await self._has_more.wait()

    def _look(self, now_s: float) -> None:
        driver = self._path.driver
        state = driver.router.state(now_s)
        self._pace.look(
            state.replicas.values(),
            num_held=state.held.num_requests,
            has_others=any(
                exchange.request.priority_class is not RequestClass.BATCH
                for exchange in driver.exchanges.values()
            ),
            num_lines=self._num_open,
            num_feeders=self._num_feeders,
            now_s=now_s,
        )

    def _send_some(self, now_s: float) -> bool:
        """Send a few lines, of one batch after the other. Return whether there may be more."""
        room = min(_LINES_AT_ONCE, self._pace.limit - self._num_open)
        for _ in range(room):
            if not self._send_one(now_s):
                return False
        return room > 0

    def _send_one(self, now_s: float) -> bool:
        runs = list(self._runs.values())
        for number in range(self._turn, self._turn + len(runs)):
            run = runs[number % len(runs)]
            if (line := run.next_line(now_s)) is not None:
                run.send(line)
                self._turn = (number + 1) % len(runs)
                return True
        return False

    async def _remove_old(self) -> None:
        while True:
            try:
                await self._database.run(self.keeping.files.remove_old)
            except (sqlite3.Error, OSError):
                logger.exception("old batches cannot be removed")
            await asyncio.sleep(_REMOVE_S)
