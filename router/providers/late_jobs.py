"""Who should leave a queue so that the others keep their promises."""

import heapq
from collections.abc import Callable

from router.types import Request


class MooreHodgson:
    """One model's queue, gone through in its order: who is cheapest to do without so far?

    Where somebody would be late, whoever has been passed and costs the least per prompt
    token leaves, until that one is in time again: Moore and Hodgson's rule (Moore 1968),
    by which as few as possible are late on one machine; there the longest leaves, which
    here is so where everybody costs the same. With prices it is a knapsack problem, and
    taking the cheapest per token is off by less than one request (Dantzig 1957).
    """

    __slots__ = ("_by_price", "_passed", "_price", "num_tokens")

    def __init__(self, price: Callable[[Request], float | None]) -> None:
        """`price(request)`: what another would take for it, None if nobody may have it."""
        self.num_tokens = 0  # prompt tokens of those passed who have not left
        self._price = price
        self._passed: list[Request] = []  # not looked at: nobody was late after them
        # Price per token, the larger first among equals, a tie-break; and who it is.
        self._by_price: list[tuple[float, int, str, Request]] = []

    def pass_by(self, request: Request) -> None:
        """The next in the queue's order."""
        self.num_tokens += request.num_prompt_tokens
        if not request.has_begun:
            self._passed.append(request)

    def cheapest(self) -> Request | None:
        """Whoever costs the least per token, looked at once; None if nobody is left."""
        for request in self._passed:
            price = self._price(request)
            if price is not None:
                num_tokens = request.num_prompt_tokens
                entry = (price / max(1, num_tokens), -num_tokens, request.id, request)
                heapq.heappush(self._by_price, entry)
        self._passed.clear()
        return heapq.heappop(self._by_price)[-1] if self._by_price else None

    def leave(self, request: Request) -> None:
        """It goes elsewhere."""
        self.num_tokens -= request.num_prompt_tokens
