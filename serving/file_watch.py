"""When has a file changed while serving, and is its new content used?"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from serving.config import ConfigError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# One `stat` per second costs nothing, and a second's delay is short enough.
_INTERVAL_S = 1.0


class FileWatchState(msgspec.Struct, frozen=True, kw_only=True):
    """How a watched file was read so far."""

    num_reloads: int
    error: str | None  # of the last reload; None: its content is used


class FileWatch(Generic[T]):
    """Read a file again when it has changed; keep its last valid content if it is broken.

    It polls, which also works over NFS and with the symbolic links that Kubernetes mounts.
    `read` runs in a thread, `apply` on the event loop. Either may raise `ConfigError`; whatever
    else it raises is its fault, is shown as well, and does not end the watch.
    """

    def __init__(self, path: Path, read: Callable[[Path], T], apply: Callable[[T], None]) -> None:
        self.path = path
        self.num_reloads = 0
        self.error: str | None = None  # of the last reload
        self._read = read
        self._apply = apply
        self._seen = _signature(path)
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            if (signature := _signature(self.path)) != self._seen:
                self._seen = signature
                await self.reload()

    async def reload(self) -> None:
        """Read the file and apply its content, changed or not."""
        try:
            content = await asyncio.to_thread(self._read, self.path)
            self._apply(content)
        except ConfigError as error:
            self.error = str(error)
            logger.error("%s is not used: %s", self.path, error)
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            logger.exception("%s is not used", self.path)
        else:
            self.error = None
            self.num_reloads += 1
            logger.info("%s was read again", self.path)

    def state(self) -> FileWatchState:
        """Return how often the file was read again, and why its content is not used."""
        return FileWatchState(num_reloads=self.num_reloads, error=self.error)

    def close(self) -> None:
        self._task.cancel()


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
