"""What was learned of answers' lengths outlives the gateway: a file, one per gateway."""

import asyncio
import logging
import os
from pathlib import Path

import msgspec

from router.estimators.lengths.predicted import LearnedLengths, PredictedLengths

logger = logging.getLogger(__name__)

# What is learned between two of these is lost if the gateway is killed: some hundred answers, of
# many thousand that count.
_SAVE_INTERVAL_S = 300.0


class LengthMemory:
    """Keeps a source of forecasts in a file; without a file it keeps nothing."""

    def __init__(self, lengths: PredictedLengths, file: Path | None, rank: int) -> None:
        """Go on from the file. One that cannot be read is as good as none: it is only a start."""
        self._lengths = lengths
        self._file = None if file is None else file.with_name(f"{file.name}.{rank}")
        self._timer: asyncio.TimerHandle | None = None
        if self._file is None:
            return
        try:
            state = msgspec.msgpack.decode(self._file.read_bytes(), type=LearnedLengths)
            lengths.restore(state)
        except FileNotFoundError:
            pass
        except (OSError, msgspec.MsgspecError) as error:
            logger.warning("%s: lengths are learned anew (%s)", self._file, error)
        self._rearm()

    def save(self) -> None:
        """Write the file, all of it or nothing; a failure is logged."""
        if self._file is None:
            return
        beside = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(msgspec.msgpack.encode(self._lengths.state()))
            beside.replace(self._file)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._file, error)

    def close(self) -> None:
        """Write it a last time."""
        if self._timer is not None:
            self._timer.cancel()
        self.save()

    def _rearm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_SAVE_INTERVAL_S, self._on_time)

    def _on_time(self) -> None:
        self.save()
        self._rearm()
