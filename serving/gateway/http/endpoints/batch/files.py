"""Which files are kept, whose are they, and how much room is left?

A file's content is in the folder, under its id; its row says whose it is. It is written under
another name first, so that one with a row is always whole.
"""

import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from serving.config.batch import BatchConfig
from serving.gateway.http.endpoints.batch.database import Database, batch_of
from serving.gateway.http.endpoints.batch.objects import OPEN, Batch, StoredFile

OPEN_STATUSES = f"({', '.join(repr(status) for status in OPEN)})"
_LEFT_OVER_S = 3600.0  # a file without a row is of a process that was killed
_PARTIAL = ".partial"
# Of a page or two that its row takes, and the directory's entry.
_ROW_BYTES = 512


class Files:
    """The files of all tenants. Its methods are for the database's thread, but for `path`."""

    def __init__(self, config: BatchConfig, database: Database) -> None:
        assert config.dir is not None
        self._config = config
        self._database = database
        self.folder = config.dir / "files"

    def path(self, file_id: str) -> Path:
        """Return where the content of a file is."""
        return self.folder / file_id

    def new_path(self) -> Path:
        """Return where a new file may be written, until it is added."""
        return self.folder / f"{secrets.token_hex(16)}{_PARTIAL}"

    def add(
        self, tenant: str, filename: str, purpose: str, written: Path, keep_s: int | None
    ) -> StoredFile:
        """Take in a file that is written. Raise `OSError` where the disk does not take it."""
        with self._database.write():
            return self.add_within(tenant, filename, purpose, written, keep_s)

    def add_within(
        self, tenant: str, filename: str, purpose: str, written: Path, keep_s: int | None
    ) -> StoredFile:
        """Take in a file as a part of a transaction."""
        now = int(self._database.clock())
        file = StoredFile(
            seq=0,
            id=f"file-{secrets.token_hex(12)}",
            tenant=tenant,
            bytes=written.stat().st_size,
            created_at=now,
            expires_at=now + (int(self._config.keep_s) if keep_s is None else keep_s),
            filename=filename,
            purpose=purpose,
        )
        written.replace(self.path(file.id))
        seq = self._database.insert(
            "INSERT INTO files (id, tenant, bytes, created_at, expires_at, filename, purpose) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            *msgspec.structs.astuple(file)[1:],
        )
        return msgspec.structs.replace(file, seq=seq)

    def find(self, tenant: str, file_id: str) -> StoredFile | None:
        """Return a tenant's file, None if it has none of this id."""
        row = self._database.row("SELECT * FROM files WHERE id = ? AND tenant = ?", file_id, tenant)
        return None if row is None else StoredFile(**dict(row))

    def page(
        self, tenant: str, after: StoredFile | None, limit: int, purpose: str, *, ascending: bool
    ) -> tuple[list[StoredFile], bool]:
        """Return a tenant's files after one of them, and whether there are more."""
        compare, order = (">", "ASC") if ascending else ("<", "DESC")
        start = after.seq if after is not None else (0 if ascending else 2**62)
        rows = self._database.rows(
            f"SELECT * FROM files WHERE tenant = ? AND seq {compare} ? "
            f"AND (? = '' OR purpose = ?) ORDER BY seq {order} LIMIT ?",
            tenant,
            start,
            purpose,
            purpose,
            limit + 1,
        )
        files = [StoredFile(**dict(row)) for row in rows]
        return files[:limit], len(files) > limit

    def user(self, file_id: str) -> str | None:
        """Return a batch that has not ended and reads the file, None if there is none."""
        row = self._database.row(
            f"SELECT id FROM batches WHERE input_file_id = ? AND status IN {OPEN_STATUSES}", file_id
        )
        return None if row is None else row["id"]

    def remove(self, file_id: str) -> None:
        """Remove a file."""
        with self._database.write():
            self._database.execute("DELETE FROM files WHERE id = ?", file_id)
        self.path(file_id).unlink(missing_ok=True)

    # --- room -----------------------------------------------------------------------

    def num_bytes(self) -> int:
        """Return the bytes of all files and of the database."""
        found = self._database.rows("SELECT SUM(bytes), COUNT(*) FROM files")[0]
        return (found[0] or 0) + found[1] * _ROW_BYTES + self._database.num_bytes()

    def make_room(self, num_bytes: int) -> bool:
        """Remove the oldest batches that have ended, if need be. Return whether there is room.

        First those of whoever takes most: nobody's results give way to another's who has more.
        """
        while self.num_bytes() + num_bytes > self._config.max_bytes:
            row = self._database.row(
                "SELECT batches.content FROM batches JOIN "
                "(SELECT tenant, SUM(bytes) AS size FROM files GROUP BY tenant) AS taken "
                "ON taken.tenant = batches.tenant WHERE batches.ended_at IS NOT NULL "
                "ORDER BY taken.size DESC, batches.seq LIMIT 1"
            )
            if row is None:
                return False
            self._remove_batch(batch_of(row))
            self._database.give_back()
        return True

    def remove_old(self) -> None:
        """Remove what has been kept long enough, and what a killed process left behind."""
        now = int(self._database.clock())
        for row in self._database.rows(
            "SELECT content FROM batches WHERE ended_at < ?", now - int(self._config.keep_s)
        ):
            self._remove_batch(batch_of(row))
        for row in self._database.rows("SELECT id FROM files WHERE expires_at < ?", now):
            if self.user(row["id"]) is None:
                self.remove(row["id"])
        for path in self.folder.iterdir():
            _remove_if_left_over(path, self._has)

    def _has(self, file_id: str) -> bool:
        return self._database.row("SELECT 1 FROM files WHERE id = ?", file_id) is not None

    def _remove_batch(self, batch: Batch) -> None:
        with self._database.write():
            self._database.execute("DELETE FROM results WHERE batch = ?", batch.seq)
            self._database.execute("DELETE FROM batches WHERE seq = ?", batch.seq)
        for file_id in (batch.input_file_id, batch.output_file_id, batch.error_file_id):
            if file_id is not None and self.user(file_id) is None:
                self.remove(file_id)


def _remove_if_left_over(path: Path, is_known: Callable[[str], bool]) -> None:
    try:
        is_old = time.time() - path.stat().st_mtime > _LEFT_OVER_S
    except FileNotFoundError:
        return  # another gateway was here
    if is_old and (path.name.endswith(_PARTIAL) or not is_known(path.name)):
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file's content on the disk, whatever happens to the machine from here on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
