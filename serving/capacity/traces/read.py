"""Which format does a trace file have? Its content tells."""

import gzip
import json
from pathlib import Path
from typing import Any

from router.simulation.workload.workload import Workload
from serving.capacity.traces import agents, mooncake, sharegpt, tables


class TraceError(Exception):
    """The file is missing, or is no trace of a known format."""


def read_trace(path: Path, seed: int = 0) -> Workload:
    """Return the workload in a file, `.gz` or plain: CSV, JSON, or one JSON object a line.

    The format is told by the columns or keys, not by the name. What a trace leaves open (the time
    within a tick, when conversations begin) is drawn from `seed`. Raises `TraceError` with the
    file's name in it.
    """
    name = path.name.removesuffix(".gz").rpartition(".")[0] or path.name
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            start = file.read(1)
            file.seek(0)
            if start not in ("{", "["):
                return Workload.of(name, tables.arrivals(file))
            if start == "[":
                rows = json.load(file)
            else:
                rows = [json.loads(line) for line in file if line.strip()]
        return Workload.of(name, _from_objects(rows, seed))
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise TraceError(f"{path}: not a trace that can be read: {reason}") from None


def _from_objects(rows: list[dict[str, Any]], seed: int) -> Any:
    if not rows or not isinstance(rows[0], dict):
        raise ValueError("no JSON objects in it")
    for reader in (mooncake, agents, sharegpt):
        if rows[0].keys() >= reader.KEYS:
            return reader.arrivals(rows, seed)
    raise ValueError(f"unknown keys {', '.join(sorted(rows[0]))}")
