"""Where are batches kept? One SQLite database, which the gateways of a node share.

Every call of it is made in one thread, never on the event loop. Each write is a transaction, so
what a process had not finished when it was killed was never there.
"""

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import msgspec

from serving.config import ConfigError
from serving.gateway.http.endpoints.batch.objects import Batch

P = ParamSpec("P")
T = TypeVar("T")

_BUSY_TIMEOUT_S = 10.0  # for another gateway to end its transaction: each takes milliseconds
_VERSION = 1
_SCHEMA = """
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL
);
CREATE INDEX files_of_tenant ON files (tenant, seq);
CREATE TABLE batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    status TEXT NOT NULL,
    owner TEXT,
    lease_until REAL NOT NULL DEFAULT 0,
    ended_at INTEGER,
    input_file_id TEXT NOT NULL,
    content BLOB NOT NULL
);
CREATE INDEX batches_of_tenant ON batches (tenant, seq);
CREATE INDEX batches_by_status ON batches (status, seq);
CREATE TABLE results (
    batch INTEGER NOT NULL,
    line INTEGER NOT NULL,
    is_error INTEGER NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (batch, line)
);
"""


class Database:
    """A connection, and the thread that has it.

    `content` of a batch is all of it; the columns beside it are what is looked for.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        """Make the folder and its tables. Raise `ConfigError` where that cannot be."""
        self.clock = clock
        self.path = folder / "batches.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # what is asked is private
            (folder / "files").mkdir(exist_ok=True, mode=0o700)
            self._connection = connect(self.path)
            self._make_tables()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"batch.dir: {folder} cannot be used: {error}") from None
        self._thread = ThreadPoolExecutor(1, "batches")

    def _make_tables(self) -> None:
        # In auto_vacuum's incremental mode pages of removed rows can be given back.
        self._connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        self._connection.execute("PRAGMA journal_mode = WAL")
        with self.write():
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
            if version == _VERSION:
                return
            if version:
                raise sqlite3.DatabaseError(f"it is of another version of Headway ({version})")
            for statement in _SCHEMA.split(";"):
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA user_version = {_VERSION}")

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Have `call`, which asks this database, made in its thread. Return what it returns.

        It is made even if nobody waits for it any more.
        """
        loop = asyncio.get_running_loop()
        made = loop.run_in_executor(self._thread, lambda: call(*args, **kwargs))
        return await asyncio.shield(made)

    def close(self, last: Callable[[], object]) -> None:
        """Make one last call, after all others, and close."""
        self._thread.submit(last)
        self._thread.shutdown(wait=True)
        self._connection.close()

    # --- within the thread ---------------------------------------------------------

    @contextlib.contextmanager
    def write(self) -> Iterator[None]:
        """Make one transaction of what is written; nothing of it stays if that fails."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """Return the rows of a query."""
        return self._connection.execute(query, values).fetchall()

    def row(self, query: str, *values: Any) -> sqlite3.Row | None:
        """Return the first row of a query, None if it has none."""
        row: sqlite3.Row | None = self._connection.execute(query, values).fetchone()
        return row

    def execute(self, statement: str, *values: Any) -> int:
        """Carry out a statement. Return how many rows it changed."""
        return self._connection.execute(statement, values).rowcount

    def insert(self, statement: str, *values: Any) -> int:
        """Add a row. Return its number."""
        return self._connection.execute(statement, values).lastrowid or 0

    def num_bytes(self) -> int:
        """Return the bytes that its content takes."""
        pages = self.rows("PRAGMA page_count")[0][0] - self.rows("PRAGMA freelist_count")[0][0]
        return pages * self.rows("PRAGMA page_size")[0][0]

    def give_back(self) -> None:
        """Give pages of what was removed back to the disk."""
        self._connection.execute("PRAGMA incremental_vacuum").fetchall()
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def connect(path: Path) -> sqlite3.Connection:
    """Return a connection that several threads may use one after the other."""
    connection = sqlite3.connect(
        path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def batch_of(row: sqlite3.Row) -> Batch:
    """Return the batch in a row."""
    return msgspec.json.decode(row["content"], type=Batch)
