"""What has this gateway sent to one engine since the engine's last snapshot?

A booking has two properties, kept apart because each is counted elsewhere:

- *unacknowledged*: booked, but not yet contained in a snapshot. Only the
  ledger knows of its tokens, so the sums below count it. Ends with the first
  snapshot whose `last_booking` is not below its number, or with `release`.
- *open*: booked and not ended. Outlives the acknowledgement; ends with
  `release` alone. When the load is gone, nothing is open.

Bookings travel over one ordered connection, so a snapshot that has seen one
number has seen all lower ones. Nothing is ever counted twice: what a snapshot
contains leaves the sums in the same call that installs the snapshot.
"""

import msgspec


class Booking(msgspec.Struct, frozen=True, gc=False):
    """Room taken on one engine for one request."""

    number: int
    request_id: str
    num_prefill_tokens: int
    num_step_tokens: int  # of these, what one scheduler step may compute
    num_kv_tokens: int
    num_own_kv_tokens: int  # of these, not shared with what is cached already
    num_sequences: int
    edf_key_s: float  # its place in the order of service
    booked_s: float


class LedgerState(msgspec.Struct, frozen=True, kw_only=True):
    """How much is booked; the two sums are over unacknowledged bookings."""

    num_open: int
    num_unacknowledged: int
    num_prefill_tokens: int
    num_kv_tokens: int


class Ledger:
    """Bookings on one replica. Its sums are updated with each change: reading is O(1)."""

    __slots__ = (
        "_last_number",
        "_open",
        "_prompts",
        "_unacknowledged",
        "num_acknowledged_own_kv_tokens",
        "num_acknowledged_sequences",
        "num_kv_tokens",
        "num_prefill_tokens",
        "num_sequences",
        "num_step_tokens",
    )

    def __init__(self) -> None:
        self.num_prefill_tokens = 0  # these four: over unacknowledged bookings
        self.num_step_tokens = 0
        self.num_kv_tokens = 0
        self.num_sequences = 0
        # These two: over open bookings that a snapshot contains.
        self.num_acknowledged_own_kv_tokens = 0
        self.num_acknowledged_sequences = 0
        self._last_number = 0
        self._open: dict[str, Booking] = {}  # by request id
        self._unacknowledged: dict[int, Booking] = {}  # by number, and so in its order
        self._prompts: dict[str, Booking] = {}  # of the open ones, those not prefilled yet

    @property
    def num_open(self) -> int:
        """Requests booked and not ended, acknowledged or not."""
        return len(self._open)

    @property
    def num_unacknowledged(self) -> int:
        """Requests that no snapshot contains yet."""
        return len(self._unacknowledged)

    @property
    def oldest_unacknowledged(self) -> Booking | None:
        """First booking that no snapshot contains yet, None if there is none."""
        for booking in self._unacknowledged.values():
            return booking
        return None

    def book(
        self,
        request_id: str,
        *,
        num_prefill_tokens: int,
        num_step_tokens: int,
        num_kv_tokens: int,
        num_own_kv_tokens: int,
        num_sequences: int,
        edf_key_s: float,
        now_s: float,
    ) -> int:
        """Add a booking and return its number: 1 for the first, then one more each.

        Raises `ValueError` if the request is booked here already: two bookings
        under one id could not be told apart when they end.
        """
        if request_id in self._open:
            raise ValueError(f"request {request_id} is booked already")
        self._last_number += 1
        booking = Booking(
            self._last_number,
            request_id,
            num_prefill_tokens,
            num_step_tokens,
            num_kv_tokens,
            num_own_kv_tokens,
            num_sequences,
            edf_key_s,
            now_s,
        )
        self._open[request_id] = self._prompts[request_id] = booking
        self._unacknowledged[booking.number] = booking
        self.num_prefill_tokens += num_prefill_tokens
        self.num_step_tokens += num_step_tokens
        self.num_kv_tokens += num_kv_tokens
        self.num_sequences += num_sequences
        return booking.number

    def acknowledge(self, last_booking: int) -> None:
        """Stop counting bookings up to this number: a snapshot contains them now."""
        if not self._unacknowledged:
            return  # the usual case
        for number in list(self._unacknowledged):
            if number > last_booking:
                break
            booking = self._forget(number)
            self.num_acknowledged_own_kv_tokens += booking.num_own_kv_tokens
            self.num_acknowledged_sequences += booking.num_sequences

    def end_prefill(self, request_id: str) -> None:
        """Note that a request's prompt is prefilled; ignore unknown ids."""
        self._prompts.pop(request_id, None)

    def waiting_keys_s(self, num_tokens: int) -> list[float]:
        """Return the EDF keys of the prompts that have the last so many tokens to prefill.

        Engines prefill in the order of keys, so these are what is left after the rest.
        """
        keys_s: list[float] = []
        if num_tokens > 0 and self._prompts:
            last_first = sorted(self._prompts.values(), key=_edf_key_s, reverse=True)
            for booking in last_first:
                keys_s.append(booking.edf_key_s)
                num_tokens -= booking.num_prefill_tokens
                if num_tokens <= 0:
                    break
        return keys_s

    def release(self, request_id: str) -> None:
        """End a request's booking; an unknown id changes nothing.

        Finished, failed, cancelled, or never sent (rolled back) make no difference
        here. If a snapshot contains the request, the next one no longer will.
        """
        booking = self._open.pop(request_id, None)
        if booking is None:
            return
        self._prompts.pop(request_id, None)
        if booking.number in self._unacknowledged:
            self._forget(booking.number)
        else:
            self.num_acknowledged_own_kv_tokens -= booking.num_own_kv_tokens
            self.num_acknowledged_sequences -= booking.num_sequences

    def state(self) -> LedgerState:
        """Return how much is booked."""
        return LedgerState(
            num_open=self.num_open,
            num_unacknowledged=self.num_unacknowledged,
            num_prefill_tokens=self.num_prefill_tokens,
            num_kv_tokens=self.num_kv_tokens,
        )

    def _forget(self, number: int) -> Booking:
        booking = self._unacknowledged.pop(number)
        self.num_prefill_tokens -= booking.num_prefill_tokens
        self.num_step_tokens -= booking.num_step_tokens
        self.num_kv_tokens -= booking.num_kv_tokens
        self.num_sequences -= booking.num_sequences
        return booking


def _edf_key_s(booking: Booking) -> float:
    return booking.edf_key_s


def peak_growth_tokens(num_sequences: int, num_tokens: int, num_to_come: int) -> float:
    """Return the KV tokens by which running sequences will exceed what they take now, ≥ 0.

    Of `num_sequences` sequences that take `num_tokens` now, with `num_to_come` to be generated.

    Each grows by a token a step and frees all of it at its end. With n sequences
    of mean size S now, whose remaining lengths are spread evenly around a mean
    of m (0 to 2m), they take n (S + t) (1 - t / 2m) after t steps: most at
    t = m - S/2, n (m - S/2)² / 2m above now, or now if that is past. So long
    answers to short prompts need room to grow, and documents hardly any.
    """
    if num_sequences <= 0 or num_to_come <= 0:
        return 0.0
    ahead = (num_to_come - num_tokens / 2.0) / num_sequences
    if ahead <= 0.0:
        return 0.0
    return ahead * ahead * num_sequences * num_sequences / (2.0 * num_to_come)
