"""The mix of requests that a comparison of policies sends: seeded, heavy-tailed, never repeated.

Eight of ten prompts are short, two are documents: whoever counts requests
sees ten equal ones. Sizes and times come from one seed, texts from that and
a salt, so that two policies get the same requests, and yet the second finds
nothing of the first's in a prefix cache.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from serving.capacity.client import Call

Kind = Literal["short", "long"]

# Shares are kept exactly in every block of so many requests. Drawn freely,
# the documents among 100 requests vary by 20 %, and the load with them.
_BLOCK = 10
_NUM_LONG_PER_BLOCK = 2

# Each of these, after a space, is one token of SmolLM2.
_TEXT = """
about above across after again along always among animal answer around autumn balance beach before
begin behind below beside between beyond book bread bridge bright bring build button camera candle
carry castle center change child church circle city clear climb clock cloud color common copper
corner cotton country cover create cross dance danger dark daughter decide deep desert dinner
distance doctor door double dream drive early earth east engine evening every family farm father
field figure final finger fire flower follow forest forward found fresh friend garden gather gentle
glass gold grass green ground group grow happy harbor hard heart heavy hidden high history hold
home horse house human hundred island journey kitchen labor lake land language large laugh leader
learn letter level light listen little local machine market matter meadow measure memory metal
middle milk minute mirror modern moment money month moon morning mother mountain music narrow
"""
_WORDS = _TEXT.split()


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of the mix, its words aside."""

    number: int
    offset_s: float  # when it arrives, from the start
    kind: Kind
    num_text_tokens: int  # of its own text; the chat template and a system prompt add to it
    num_output_tokens: int
    group: int | None = None  # whose system prompt it bears


@dataclass(frozen=True)
class Mix:
    """Sizes in tokens, both ends included, each drawn uniformly."""

    short_tokens: tuple[int, int] = (8, 64)
    long_tokens: tuple[int, int] = (600, 1500)
    output_tokens: tuple[int, int] = (8, 48)
    num_groups: int = 0  # shared system prompts; 0: none
    system_tokens: int = 400

    def asks(self, seed: str) -> Iterator[Ask]:
        """Yield requests without end, all due at once: what saturates."""
        rng = random.Random(f"mix {seed}")
        number = 0
        while True:
            kinds: list[Kind] = ["long"] * _NUM_LONG_PER_BLOCK
            kinds += ["short"] * (_BLOCK - _NUM_LONG_PER_BLOCK)
            rng.shuffle(kinds)
            for kind in kinds:
                tokens = self.short_tokens if kind == "short" else self.long_tokens
                yield Ask(
                    number,
                    0.0,
                    kind,
                    rng.randint(*tokens),
                    rng.randint(*self.output_tokens),
                    rng.randrange(self.num_groups) if self.num_groups else None,
                )
                number += 1

    def arrivals(self, rate: float, duration_s: float, seed: str) -> list[Ask]:
        """Return the requests of `duration_s` at `rate` per second, in order of arrival.

        A Poisson process given its count: `rate * duration_s` times, drawn
        uniformly. So every repeat has the same load.
        """
        rng = random.Random(f"arrivals {seed}")
        num_asks = round(rate * duration_s)
        offsets_s = sorted(rng.uniform(0.0, duration_s) for _ in range(num_asks))
        return [
            Ask(
                ask.number,
                offset_s,
                ask.kind,
                ask.num_text_tokens,
                ask.num_output_tokens,
                ask.group,
            )
            for offset_s, ask in zip(offsets_s, self.asks(seed), strict=False)
        ]

    def messages(self, ask: Ask, salt: str) -> list[dict[str, str]]:
        """Return what is said; another salt says it in other words of the same size."""
        messages = [{"role": "user", "content": _text(ask.num_text_tokens, f"{salt} {ask.number}")}]
        if ask.group is not None:
            system = _text(self.system_tokens, f"{salt} group {ask.group}")
            messages.insert(0, {"role": "system", "content": system})
        return messages

    def call(self, ask: Ask, model: str, salt: str) -> Call:
        """Return the request to send: streamed, of known length, with its usage told."""
        extra: dict[str, Any] = {
            "messages": self.messages(ask, salt),
            "stream_options": {"include_usage": True},
        }
        return Call.chat(model, "", ask.num_output_tokens, stream=True, **extra)


def _text(num_tokens: int, seed: str) -> str:
    """So many words; two seeds share a first block of the prefix cache practically never."""
    return " ".join(random.Random(seed).choices(_WORDS, k=num_tokens))
