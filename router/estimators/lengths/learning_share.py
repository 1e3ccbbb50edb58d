"""Of which answers is something learned, where there are more than are needed?

What is learned is means over some hundred answers. A gateway that ends five hundred a second would
have forgotten all that was a second ago, and what it learned of each would cost as much as to
place it. So from some rate on it learns of a share, drawn by the requests' ids: which answers of
a step are told of first depends on how long they are, their ids do not.
"""

import zlib
from typing import Final

# A change of traffic is followed within some seconds then, as at this rate.
MAX_PER_S: Final = 50.0
_SPAN_S: Final = 1.0  # over which answers are counted
_IDS: Final = 2.0**32


class LearningShare:
    """Says of each answer whether it is among those that are learned from."""

    __slots__ = ("_num", "_share", "_since_s")

    def __init__(self) -> None:
        self._share = 1.0
        self._num = 0  # answers since then
        self._since_s = float("-inf")

    def has(self, request_id: str, now_s: float) -> bool:
        """Whether to learn of this answer, which ends now. To be asked once of each."""
        self._num += 1
        span_s = now_s - self._since_s
        if span_s >= _SPAN_S:
            self._share = min(1.0, MAX_PER_S * span_s / self._num)
            self._since_s, self._num = now_s, 0
        return self._share >= 1.0 or zlib.crc32(request_id.encode()) < self._share * _IDS
