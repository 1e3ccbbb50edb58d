"""Which batches are there, who runs each of them, and what has been answered so far?

One gateway runs a batch: whoever has its lease. A gateway that was stopped may wake up after its
lease has gone to another one; so every write looks, in its own transaction, whether the batch is
still its writer's. A line's answer is a row of its own, of which there can be only one.
"""

import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from serving.gateway.http.endpoints.batch.database import Database, batch_of, connect
from serving.gateway.http.endpoints.batch.files import OPEN_STATUSES, Files, sync
from serving.gateway.http.endpoints.batch.objects import (
    OPEN,
    Batch,
    BatchError,
    BatchUsage,
    StoredFile,
)

# Longer than an event loop is ever busy; and after a gateway was killed its batches wait so long.
LEASE_S = 6.0


class Result(NamedTuple):
    """What became of one line."""

    line: int  # from 1
    is_error: bool
    body: bytes  # the line of the output, or of the error file


class BatchStore:
    """The batches of all tenants. Its methods are for the database's thread.

    Where a method of the one who runs a batch returns None, that is another one now.
    """

    def __init__(self, database: Database, files: Files, owner: str) -> None:
        """`owner` names this gateway, in this life of it."""
        self._database = database
        self._files = files
        self._owner = owner

    # --- for clients ----------------------------------------------------------------

    def add(
        self,
        file: StoredFile,
        endpoint: str,
        window: str,
        window_s: int,
        metadata: dict[str, str] | None,
        output_keep_s: int | None,
    ) -> Batch:
        """Begin a batch of an uploaded file, which is its tenant's."""
        now = int(self._database.clock())
        batch = Batch(
            seq=0,
            id=f"batch_{secrets.token_hex(12)}",
            tenant=file.tenant,
            endpoint=endpoint,
            input_file_id=file.id,
            completion_window=window,
            metadata=metadata,
            output_keep_s=output_keep_s,
            status="validating",
            created_at=now,
            expires_at=now + window_s,
        )
        with self._database.write():
            seq = self._database.insert(
                "INSERT INTO batches (id, tenant, status, input_file_id, content) "
                "VALUES (?, ?, ?, ?, '')",
                batch.id,
                batch.tenant,
                batch.status,
                file.id,
            )
            batch = msgspec.structs.replace(batch, seq=seq)
            self._write(batch)
        return batch

    def find(self, tenant: str, batch_id: str) -> Batch | None:
        """Return a tenant's batch, None if it has none of this id."""
        row = self._database.row(
            "SELECT content FROM batches WHERE id = ? AND tenant = ?", batch_id, tenant
        )
        return None if row is None else batch_of(row)

    def page(self, tenant: str, after: Batch | None, limit: int) -> tuple[list[Batch], bool]:
        """Return a tenant's batches, the newest first, and whether there are more."""
        rows = self._database.rows(
            "SELECT content FROM batches WHERE tenant = ? AND seq < ? ORDER BY seq DESC LIMIT ?",
            tenant,
            after.seq if after is not None else 2**62,
            limit + 1,
        )
        return [batch_of(row) for row in rows[:limit]], len(rows) > limit

    def num_open(self, tenant: str) -> int:
        """Return how many of a tenant's batches have not ended."""
        query = f"SELECT COUNT(*) FROM batches WHERE tenant = ? AND status IN {OPEN_STATUSES}"
        return int(self._database.rows(query, tenant)[0][0])

    def cancel(self, tenant: str, batch_id: str) -> Batch | None:
        """Have a batch cancelled, unless it is past that. Return it; None for none."""
        with self._database.write():
            batch = self.find(tenant, batch_id)
            if batch is None or batch.status not in ("validating", "in_progress"):
                return batch
            now = int(self._database.clock())
            return self._write(
                msgspec.structs.replace(batch, status="cancelling", cancelling_at=now)
            )

    # --- for the gateway that runs a batch ------------------------------------------

    def claim(self, running: Counter[str]) -> Batch | None:
        """Take a batch that nobody runs: the oldest of whoever has the fewest running here.

        `running` counts those here by tenant.
        """
        now = self._database.clock()
        with self._database.write():
            # A lease that is longer than any was given before the clock was set back.
            rows = self._database.rows(
                f"SELECT seq, tenant, MIN(seq) FROM batches WHERE status IN {OPEN_STATUSES} "
                "AND (owner IS NULL OR owner != ? AND (lease_until < ? OR lease_until > ?)) "
                "GROUP BY tenant",
                self._owner,
                now,
                now + 2 * LEASE_S,
            )
            if not rows:
                return None
            row = min(rows, key=lambda row: (running[row["tenant"]], row["seq"]))
            self._database.execute(
                "UPDATE batches SET owner = ?, lease_until = ? WHERE seq = ?",
                self._owner,
                now + LEASE_S,
                row["seq"],
            )
            return self._read(row["seq"])

    def renew(self, seq: int) -> Batch | None:
        """Keep the lease of a batch. Return the batch as it is now."""
        with self._database.write():
            return self._read(seq) if self._extend(seq) else None

    def begin(self, seq: int, total: int, model: str | None) -> Batch | None:
        """Note that all lines of a batch are right, and go on with it."""
        return self._change(
            seq,
            "validating",
            status="in_progress",
            stamp="in_progress_at",
            total=total,
            model=model,
        )

    def fail(self, seq: int, errors: Sequence[BatchError]) -> Batch | None:
        """End a batch that is wrong."""
        now = int(self._database.clock())
        with self._database.write():
            batch = self._owned(seq)
            if batch is None:
                return None
            self._database.execute("DELETE FROM results WHERE batch = ?", seq)
            return self._write(
                msgspec.structs.replace(batch, status="failed", failed_at=now, errors=list(errors))
            )

    def answered_lines(self, seq: int) -> set[int]:
        """Return the numbers of the lines that have been answered."""
        rows = self._database.rows("SELECT line FROM results WHERE batch = ?", seq)
        return {row["line"] for row in rows}

    def record(self, seq: int, results: Sequence[Result], usage: BatchUsage) -> Batch | None:
        """Keep what became of some lines, and the lease. Return the batch as it is now."""
        with self._database.write():
            batch = self._owned(seq)
            if batch is None or not self._extend(seq):
                return None
            num_new = [0, 0]
            for result in results:
                num_new[result.is_error] += self._database.execute(
                    "INSERT OR IGNORE INTO results (batch, line, is_error, body) "
                    "VALUES (?, ?, ?, ?)",
                    seq,
                    result.line,
                    int(result.is_error),
                    result.body,
                )
            batch.usage.add(usage)
            return self._write(
                msgspec.structs.replace(
                    batch,
                    completed=batch.completed + num_new[False],
                    failed=batch.failed + num_new[True],
                )
            )

    def begin_finalizing(self, seq: int) -> Batch | None:
        """Note that every line of a batch has been answered."""
        return self._change(seq, "in_progress", status="finalizing", stamp="finalizing_at")

    def end(self, seq: int, status: str, outputs: Path | None, errors: Path | None) -> Batch | None:
        """End a batch whose files are written, in one of its last states."""
        with self._database.write():
            batch = self._owned(seq)
            if batch is None:
                return None
            file_ids: list[str | None] = []
            for name, path in (("output", outputs), ("error", errors)):
                if path is None:
                    file_ids.append(None)
                    continue
                file = self._files.add_within(
                    batch.tenant,
                    f"{batch.id}_{name}.jsonl",
                    "batch_output",
                    path,
                    batch.output_keep_s,
                )
                file_ids.append(file.id)
            self._database.execute("DELETE FROM results WHERE batch = ?", seq)
            now = int(self._database.clock())
            changes: dict[str, Any] = {f"{status}_at": now, "status": status}
            if batch.finalizing_at is None and status == "expired":
                changes["finalizing_at"] = now
            return self._write(
                msgspec.structs.replace(
                    batch, output_file_id=file_ids[0], error_file_id=file_ids[1], **changes
                )
            )

    def release(self, seq: int | None = None) -> None:
        """Let others run a batch that this gateway runs, or all of them."""
        with self._database.write():
            self._database.execute(
                "UPDATE batches SET owner = NULL, lease_until = 0 "
                "WHERE owner = ? AND (? IS NULL OR seq = ?)",
                self._owner,
                seq,
                seq,
            )

    def num_owners(self) -> int:
        """Return how many gateways run batches, this one included."""
        found = self._database.rows(
            f"SELECT COUNT(DISTINCT owner) FROM batches WHERE status IN {OPEN_STATUSES} "
            "AND owner != ? AND lease_until > ?",
            self._owner,
            self._database.clock(),
        )
        return 1 + int(found[0][0])

    # --- within a transaction -------------------------------------------------------

    def _change(
        self, seq: int, before: str, *, status: str, stamp: str, **changes: Any
    ) -> Batch | None:
        """Bring a batch into another state, unless it has left the one before: being cancelled."""
        now = int(self._database.clock())
        with self._database.write():
            batch = self._owned(seq)
            if batch is None or batch.status != before:
                return batch
            return self._write(
                msgspec.structs.replace(batch, status=status, **{stamp: now}, **changes)
            )

    def _owned(self, seq: int) -> Batch | None:
        row = self._database.row(
            "SELECT content FROM batches WHERE seq = ? AND owner = ?", seq, self._owner
        )
        return None if row is None else batch_of(row)

    def _extend(self, seq: int) -> bool:
        until = self._database.clock() + LEASE_S
        return bool(
            self._database.execute(
                "UPDATE batches SET lease_until = ? WHERE seq = ? AND owner = ?",
                until,
                seq,
                self._owner,
            )
        )

    def _read(self, seq: int) -> Batch:
        [row] = self._database.rows("SELECT content FROM batches WHERE seq = ?", seq)
        return batch_of(row)

    def _write(self, batch: Batch) -> Batch:
        has_ended = batch.status not in OPEN
        self._database.execute(
            "UPDATE batches SET status = ?, ended_at = ?, content = ? WHERE seq = ?",
            batch.status,
            int(self._database.clock()) if has_ended else None,
            msgspec.json.encode(batch),
            batch.seq,
        )
        return batch


def write_results(database_path: Path, seq: int, outputs: Path, errors: Path) -> tuple[int, int]:
    """Write the results of a batch into two files, in the order of its lines.

    Return the numbers of lines. For a thread of its own, with a connection of its own: it takes
    as long as the results are large.
    """
    counts = [0, 0]
    connection = connect(database_path)
    try:
        with outputs.open("wb") as output, errors.open("wb") as error:
            for is_error, body in _results(connection, seq):
                counts[is_error] += 1
                (error if is_error else output).write(body + b"\n")
    finally:
        connection.close()
    for path in (outputs, errors):
        sync(path)
    return counts[0], counts[1]


def _results(connection: Any, seq: int) -> Iterator[tuple[int, bytes]]:
    for row in connection.execute(
        "SELECT is_error, body FROM results WHERE batch = ? ORDER BY line", (seq,)
    ):
        yield row["is_error"], row["body"]
