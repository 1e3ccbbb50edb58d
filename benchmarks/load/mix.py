"""Which requests does a comparison send? A seeded, heavy-tailed mix that never repeats a text.

Eight of ten prompts are short, two are documents; a policy that counts requests sees ten equal
ones. Sizes and times follow from a seed, texts from the seed and a salt. So two policies get the
same requests, and yet the second finds none of the first's prompts in a prefix cache.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from serving.capacity.client import ApiRequest

PromptKind = Literal["short", "long"]

# In every block of so many requests the shares are exact. Were they drawn freely, the number of
# documents among 100 requests would vary by 20 %, and the load with it.
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
class MixRequest:
    """One request of the mix, without its text."""

    number: int
    offset_s: float  # from the start to its arrival
    kind: PromptKind
    num_text_tokens: int  # of its own text, without chat template and system prompt
    num_output_tokens: int
    group: int | None = None  # with which system prompt it begins


@dataclass(frozen=True)
class Mix:
    """Ranges of sizes in tokens, both ends included; each size is drawn uniformly."""

    short_tokens: tuple[int, int] = (8, 64)
    long_tokens: tuple[int, int] = (600, 1500)
    output_tokens: tuple[int, int] = (8, 48)
    num_groups: int = 0  # shared system prompts; 0: none
    system_tokens: int = 400

    def requests(self, seed: str) -> Iterator[MixRequest]:
        """Yield requests without end, all due at once, as a closed loop needs them."""
        rng = random.Random(f"mix {seed}")
        number = 0
        while True:
            kinds: list[PromptKind] = ["long"] * _NUM_LONG_PER_BLOCK
            kinds += ["short"] * (_BLOCK - _NUM_LONG_PER_BLOCK)
            rng.shuffle(kinds)
            for kind in kinds:
                tokens = self.short_tokens if kind == "short" else self.long_tokens
                yield MixRequest(
                    number,
                    0.0,
                    kind,
                    rng.randint(*tokens),
                    rng.randint(*self.output_tokens),
                    rng.randrange(self.num_groups) if self.num_groups else None,
                )
                number += 1

    def arrivals(self, rate: float, duration_s: float, seed: str) -> list[MixRequest]:
        """Return the requests of `duration_s` at `rate` per second, in order of arrival.

        A Poisson process given its count: `rate * duration_s` times, drawn uniformly. So every
        repeat has the same load.
        """
        rng = random.Random(f"arrivals {seed}")
        num_requests = round(rate * duration_s)
        offsets_s = sorted(rng.uniform(0.0, duration_s) for _ in range(num_requests))
        return [
            replace(request, offset_s=offset_s)
            for offset_s, request in zip(offsets_s, self.requests(seed), strict=False)
        ]

    def messages(self, request: MixRequest, salt: str) -> list[dict[str, str]]:
        """Return the messages of the chat; another salt gives other words of the same size."""
        text = _text(request.num_text_tokens, f"{salt} {request.number}")
        messages = [{"role": "user", "content": text}]
        if request.group is not None:
            system = _text(self.system_tokens, f"{salt} group {request.group}")
            messages.insert(0, {"role": "system", "content": system})
        return messages

    def api_request(self, request: MixRequest, model: str, salt: str) -> ApiRequest:
        """Return what to send: a streamed chat of known output length that reports its usage."""
        extra: dict[str, Any] = {
            "messages": self.messages(request, salt),
            "stream_options": {"include_usage": True},
        }
        return ApiRequest.chat(model, "", request.num_output_tokens, stream=True, **extra)


def _text(num_tokens: int, seed: str) -> str:
    """Return so many words. Texts of two seeds practically never share a prefix-cache block."""
    return " ".join(random.Random(seed).choices(_WORDS, k=num_tokens))
