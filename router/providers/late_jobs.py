"""Which requests should leave a queue so that as few as possible are late?"""

import heapq
from collections.abc import Callable

from router.types import Request


class MooreHodgson:
    """One model's queue, added in its order, and who of it is cheapest to send elsewhere.

    Where a request would be late, the request added so far that costs the least per prompt
    token is removed, until that one is on time again. This is Moore and Hodgson's rule
    (Moore 1968), by which as few jobs as possible are late on one machine. Theirs removes
    the longest job; so does this where every request costs the same. With prices it is a
    knapsack problem, and taking the cheapest per token is off by less than one request
    (Dantzig 1957).
    """

    __slots__ = ("_by_price", "_price", "_unpriced", "num_tokens")

    def __init__(self, price: Callable[[Request], float | None]) -> None:
        """`price(request)`: what a provider would take for it, None if none may have it."""
        self.num_tokens = 0  # prompt tokens of the requests added and not removed
        self._price = price
        # Not priced yet: no request was late after them.
        self._unpriced: list[Request] = []
        # Price per token, the larger first among equals, a tie-break; and the request.
        self._by_price: list[tuple[float, int, str, Request]] = []

    def add_request(self, request: Request) -> None:
        """Add the next request in the queue's order."""
        self.num_tokens += request.num_prompt_tokens
        if not request.has_begun:
            self._unpriced.append(request)

    def pop_cheapest(self) -> Request | None:
        """Return the request that costs the least per token, each once; None if none is left."""
        for request in self._unpriced:
            price = self._price(request)
            if price is not None:
                num_tokens = request.num_prompt_tokens
                entry = (price / max(1, num_tokens), -num_tokens, request.id, request)
                heapq.heappush(self._by_price, entry)
        self._unpriced.clear()
        return heapq.heappop(self._by_price)[-1] if self._by_price else None

    def remove_request(self, request: Request) -> None:
        """Take a request's tokens out of the queue: it goes elsewhere."""
        self.num_tokens -= request.num_prompt_tokens
