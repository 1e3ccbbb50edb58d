"""Ctrl-C and SIGTERM: the first stops what is being waited for, the second hurries."""

import signal
from types import FrameType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop(KeyboardInterrupt):
    """The first signal, raised wherever the main thread is."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Interrupts:
    """Counts signals. Only the first raises: cleaning up is never cut short by another."""

    def __init__(self) -> None:
        self._count = 0
        self._before: dict[int, object] = {}

    @property
    def hurry(self) -> bool:
        """Whether a second signal has come: do not wait for anything any more."""
        return self._count > 1

    def __enter__(self) -> Self:
        self._before = {signum: signal.getsignal(signum) for signum in _SIGNALS}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def install(self) -> None:
        """Take the signals; again after `ray.init`, which takes SIGTERM for itself."""
        for signum in _SIGNALS:
            signal.signal(signum, self._on_signal)

    def quiet(self) -> None:
        """From now on no signal raises: the end has begun for another reason."""
        self._count = max(self._count, 1)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        self._count += 1
        if self._count == 1:
            raise Stop(signum)
