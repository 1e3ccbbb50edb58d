"""Which requests are sent, and when? Without their text, in order of arrival.

Open loop: every time is fixed before the first request is sent, so a slow system does not slow
the load on it. A trace is brought to a wanted load by scaling its time; the scale is part of the
result.
"""

import math
import random
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, Self

import msgspec
import numpy as np

from router import RequestClass
from router.simulation.workload.prefixes import chained_hash, chained_hashes

_COPY_BITS = 16  # of an id of a prefix, what tells copies apart


class Arrival(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request: its time, its sizes, and the prefix that it may share with others.

    `prefix_ids[i]` names the first `(i + 1) * prefix_block_tokens` tokens of prompt and reply,
    whole blocks only: two requests with the same id at one position are equal up to its end. Ids
    stop where no other request shares the rest.
    """

    offset_s: float  # from the start
    num_prompt_tokens: int
    num_output_tokens: int
    max_output_tokens: int | None = None  # the client's limit, if it sets one
    tenant: str = ""
    session: str = ""  # the conversation of which it is a turn
    priority_class: RequestClass = RequestClass.STANDARD
    prefix_ids: tuple[int, ...] = ()
    prefix_block_tokens: int = 0
    # What its prompt begins with: the prompt of the turn before, and with the answer to that.
    num_said_tokens: int = 0
    num_heard_tokens: int = 0

    def block_hashes(self, block_tokens: int, *, with_reply: bool = False) -> tuple[int, ...]:
        """Return the chained hashes of successive whole blocks of so many tokens.

        Of the prompt, or also of the reply, which engines cache, too. Without the part that no
        other request shares.
        """
        if not self.prefix_ids:
            return ()
        num_tokens = self.num_prompt_tokens + (self.num_output_tokens if with_reply else 0)
        return chained_hashes(self.prefix_ids, self.prefix_block_tokens, num_tokens, block_tokens)

    def last_block(self, block_tokens: int) -> int:
        """Return the hash of the last whole block of prompt and reply; 0 if nobody shares it.

        The reply's last token is not computed.
        """
        num_tokens = self.num_prompt_tokens + self.num_output_tokens - 1
        end = num_tokens // block_tokens * block_tokens
        index = (end - 1) // self.prefix_block_tokens if self.prefix_block_tokens else 0
        if not end or index >= len(self.prefix_ids):
            return 0
        return chained_hash(self.prefix_ids[index], end)

    def text_hash(self, num_tokens: int) -> int:
        """Return the hash of its first so many tokens, of which others may have the same.

        0 where no other request shares them.
        """
        index = (num_tokens - 1) // self.prefix_block_tokens if self.prefix_block_tokens else 0
        if num_tokens < 1 or index >= len(self.prefix_ids):
            return 0
        return -chained_hash(self.prefix_ids[index], num_tokens)  # never that of a whole block


@dataclass(frozen=True)
class Workload:
    """Arrivals, and how they were changed since they were read or drawn."""

    name: str
    arrivals: tuple[Arrival, ...]
    scale: float = 1.0  # times as fast as recorded
    num_copies: int = 1  # overlaid
    num_capped: int = 0  # requests cut to the engine's length
    num_dropped: int = 0  # requests left out, for they are longer than the engine's length

    @classmethod
    def of(cls, name: str, arrivals: Iterable[Arrival]) -> Self:
        """Return the workload in order of arrival, the first at 0 s.

        Raises `ValueError` if there is no request.
        """
        ordered = sorted(arrivals, key=lambda arrival: arrival.offset_s)
        if not ordered:
            raise ValueError(f"{name}: no requests in it")
        start_s = ordered[0].offset_s
        if start_s:
            ordered = [_at(arrival, arrival.offset_s - start_s) for arrival in ordered]
        return cls(name, tuple(ordered))

    def __reduce__(self) -> tuple[type["Workload"], tuple[object, ...]]:
        # By its fields: compiled, a frozen class does not let a pickle set them.
        counts = (self.scale, self.num_copies, self.num_capped, self.num_dropped)
        return Workload, (self.name, self.arrivals, *counts)

    def __len__(self) -> int:
        return len(self.arrivals)

    @property
    def duration_s(self) -> float:
        """Seconds from the first arrival to one mean gap after the last."""
        last_s, num_gaps = self.arrivals[-1].offset_s, len(self.arrivals) - 1
        return last_s * (1.0 + 1.0 / num_gaps) if num_gaps else 0.0

    @property
    def rate(self) -> float:
        """Mean requests per second; 0 if all arrive at once."""
        return len(self.arrivals) / self.duration_s if self.duration_s else 0.0

    def at_rate(self, rate: float) -> "Workload":
        """Return the same requests, with time scaled to a mean rate.

        Raises `ValueError` if all arrive at once, which no scale changes.
        """
        if not self.rate:
            raise ValueError(f"{self.name}: all requests come at once, so no scaling gives a rate")
        factor = rate / self.rate
        arrivals = tuple(_at(each, each.offset_s / factor) for each in self.arrivals)
        return replace(self, arrivals=arrivals, scale=self.scale * factor)

    def at_once(self) -> "Workload":
        """Return the same requests, all at the start, which saturates every fleet."""
        return replace(self, arrivals=tuple(_at(each, 0.0) for each in self.arrivals))

    def drawn(
        self, rate: float, num_requests: int, seed: int, num_copies: int | None = None
    ) -> "Workload":
        """Return so many requests at a mean rate, from copies that begin at random places.

        As many copies as keep the requests' own speed, unless so many are asked for: laid over one
        another, they keep bursts and pauses as they were, where a faster trace has them shorter
        and denser. One copy is the trace made faster. Copies share no prefixes, nor do the laps
        of one that is read more than once.
        """
        if num_copies is None:
            num_copies = max(1, round(rate / self.rate))
        rng = random.Random(f"copies {seed}")
        span_s = self.duration_s
        starts_s = [rng.random() * span_s for _ in range(num_copies)]
        taken_s = span_s * num_requests / (num_copies * len(self))
        while True:  # bursts apart, the mean is enough
            arrivals = self._taken(starts_s, taken_s)
            if len(arrivals) >= num_requests:
                break
            taken_s *= 1.2
        arrivals.sort(key=lambda arrival: arrival.offset_s)
        found = Workload.of(self.name, arrivals[:num_requests]).at_rate(rate)
        scale = self.scale * rate / (num_copies * self.rate)
        return replace(found, scale=scale, num_copies=num_copies, num_dropped=self.num_dropped)

    def _taken(self, starts_s: list[float], taken_s: float) -> list[Arrival]:
        """Return what comes within so many seconds from each start; past the end it begins anew."""
        span_s, offsets_s = self.duration_s, [each.offset_s for each in self.arrivals]
        num_laps = math.ceil(taken_s / span_s) + 1
        arrivals: list[Arrival] = []
        for copy, start_s in enumerate(starts_s):
            for lap in range(num_laps):
                late_s = span_s * lap - start_s
                first = bisect_left(offsets_s, -late_s)
                last = bisect_left(offsets_s, taken_s - late_s)
                names: dict[int, int] = {}  # the turns of a session share them
                for arrival in self.arrivals[first:last]:
                    offset_s = arrival.offset_s + late_s
                    arrivals.append(_copied(arrival, offset_s, copy * num_laps + lap, names))
        return arrivals

    def part(self, number: int, num_requests: int) -> "Workload":
        """Return the `number`-th part of so many requests, from 0; past the end start again.

        Return all requests if there are no more than that.
        """
        num_parts = max(1, len(self) // num_requests)
        start = number % num_parts * num_requests
        part = Workload.of(self.name, self.arrivals[start : start + num_requests])
        return replace(self, arrivals=part.arrivals)

    def overlaid(self, num_copies: int) -> "Workload":
        """Return so many copies at the same time, each rotated to another start.

        For a fleet larger than the traced one: a trace only compressed in time would end before
        the engines are warm, and its bursts would be that much denser. Copies share no prefixes.
        """
        if num_copies == 1:
            return self
        span_s = self.duration_s
        arrivals = [
            msgspec.structs.replace(
                each,
                offset_s=(each.offset_s + span_s * copy / num_copies) % span_s,
                prefix_ids=tuple(number * num_copies + copy for number in each.prefix_ids),
            )
            for copy in range(num_copies)
            for each in self.arrivals
        ]
        arrivals.sort(key=lambda arrival: arrival.offset_s)
        return replace(self, arrivals=tuple(arrivals), num_copies=self.num_copies * num_copies)

    def fitted(self, max_model_len: int, how: Literal["cap", "drop"] = "drop") -> "Workload":
        """Return it with requests longer than an engine's length left out, or cut.

        Cut means: a reply of at most half the length, and a prompt that leaves room for it.
        """
        fitting = [
            each
            for each in self.arrivals
            if each.num_prompt_tokens + each.num_output_tokens <= max_model_len
        ]
        num_beyond = len(self.arrivals) - len(fitting)
        if not num_beyond:
            return self
        if how == "drop":
            if not fitting:
                raise ValueError(
                    f"{self.name}: every request is longer than max_model_len {max_model_len}"
                )
            return replace(self, arrivals=tuple(fitting), num_dropped=self.num_dropped + num_beyond)
        capped = tuple(_capped(each, max_model_len) for each in self.arrivals)
        return replace(self, arrivals=capped, num_capped=self.num_capped + num_beyond)

    def describe(self) -> dict[str, str | int | float]:
        """Return the properties that a result must state."""
        prompts = np.array([each.num_prompt_tokens for each in self.arrivals])
        outputs = np.array([each.num_output_tokens for each in self.arrivals])
        return {
            "name": self.name,
            "num_requests": len(self.arrivals),
            "duration_s": self.duration_s,
            "requests_per_s": self.rate,
            "time_scale": self.scale,
            "num_copies": self.num_copies,
            "num_capped": self.num_capped,
            "num_dropped": self.num_dropped,
            "prompt_tokens_mean": float(prompts.mean()),
            "prompt_tokens_p50": float(np.median(prompts)),
            "prompt_tokens_p99": float(np.percentile(prompts, 99)),
            "output_tokens_mean": float(outputs.mean()),
            "output_tokens_p50": float(np.median(outputs)),
            "output_tokens_p99": float(np.percentile(outputs, 99)),
        }


def _copied(arrival: Arrival, offset_s: float, copy: int, names: dict[int, int]) -> Arrival:
    """Return a copy that shares a prefix only with others of the same copy.

    `names`: of its blocks, by those of the original; what is missing is added.
    """
    ids: list[int] = []
    for number in arrival.prefix_ids:
        name = names.get(number)
        if name is None:
            name = names[number] = number << _COPY_BITS | copy
        ids.append(name)
    return msgspec.structs.replace(arrival, offset_s=offset_s, prefix_ids=tuple(ids))


def _at(arrival: Arrival, offset_s: float) -> Arrival:
    return msgspec.structs.replace(arrival, offset_s=offset_s)


def _capped(arrival: Arrival, max_model_len: int) -> Arrival:
    num_output_tokens = min(arrival.num_output_tokens, max_model_len // 2)
    return msgspec.structs.replace(
        arrival,
        num_output_tokens=num_output_tokens,
        num_prompt_tokens=min(arrival.num_prompt_tokens, max_model_len - num_output_tokens),
        num_said_tokens=0,
        num_heard_tokens=0,
    )
