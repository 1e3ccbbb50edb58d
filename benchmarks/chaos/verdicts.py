"""What is asked of real engines under chaos, and how their replies are judged.

A greedy reply is *equal* to the one of an undisturbed run, token by token, or
*near ties* explain it: up to the first difference they agree, there vLLM itself
gives both tokens the same probability within a rounding error, and asked to go on
from the reply's own tokens it says what the reply says (but for further near
ties, from behind which it is asked again). Anything else is *unexplained*.
"""

import enum
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx

from benchmarks.chaos.client import Question, Reply
from serving.capacity.launch import MeasureError

# What adding up in another order may turn: for bfloat16 two steps between neighbouring
# numbers at the size that logits have (up to 32); for float32 some hundred such steps,
# which add up over the layers.
TIE_NATS = {"bfloat16": 0.25, "float32": 0.002}
_NUM_TOP = 5

_TOPICS = (
    "the water cycle", "the French Revolution", "how bread is made", "the planet Mars",
    "how a bicycle works", "the history of chess", "why the sky is blue", "the human heart",
    "how rivers form", "the Roman Empire", "what photosynthesis is", "how a camera works",
)  # fmt: skip
_TIMEOUT = httpx.Timeout(120.0)


def questions(num_tokens: tuple[int, ...] = (40, 70, 100)) -> list[Question]:
    """Chats, completions and documents, most of them streamed; each fails in its own way."""
    sizes = itertools.cycle(num_tokens)
    found = [Question(f"Tell me about {topic}.", next(sizes), ends_early=True) for topic in _TOPICS]
    found += [
        Question(f"Here is what everybody should know about {topic}:", next(sizes), is_chat=False)
        for topic in _TOPICS[:6]
    ]
    found += [
        Question(_document(topic) + f" Now tell me about {topic}.", next(sizes), ends_early=True)
        for topic in _TOPICS[6:]
    ]
    found += [
        Question(f"Explain {topic} to a child.", next(sizes), is_streamed=False, ends_early=True)
        for topic in _TOPICS[:4]
    ]
    return found


def _document(topic: str) -> str:
    """A few hundred tokens: two steps of prefill and more."""
    return "Read this first. " + " ".join(
        f"Note {number} about {topic} was written on day {number * 7 % 31} by reader {number}."
        for number in range(1, 22)
    )


class Kind(enum.Enum):
    """How a reply compares with the undisturbed one."""

    EQUAL = "equal"
    NEAR_TIE = "near tie"
    UNEXPLAINED = "unexplained"


@dataclass(frozen=True)
class Verdict:
    """About one reply; positions count the answer's tokens from 0."""

    kind: Kind
    first_difference: int | None = None
    gap: float = 0.0  # nats between the two tokens there
    num_ties: int = 0  # that vLLM had to be told of until it said what the reply says


# What vLLM says behind these token ids, so many at most: ids, and for each position the
# log probabilities of the likeliest.
GoOn = Callable[[list[int], int], Awaitable[tuple[list[int], list[dict[int, float]]]]]


def vllm_going_on(http: httpx.AsyncClient, model: str, *, ignore_eos: bool) -> GoOn:
    """Ask the service, as anybody may."""

    async def go_on(token_ids: list[int], num_tokens: int) -> tuple[list[int], list[dict]]:
        body = {
            "model": model,
            "prompt": token_ids,
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": ignore_eos,
            "logprobs": _NUM_TOP,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        response = await http.post("/v1/completions", json=body, timeout=_TIMEOUT)
        if response.status_code != 200:
            raise MeasureError(f"cannot compare: {response.text[:500]}")
        choice = response.json()["choices"][0]
        tops = [
            {int(name.removeprefix("token_id:")): value for name, value in top.items()}
            for top in choice["logprobs"]["top_logprobs"]
        ]
        return choice["token_ids"], tops

    return go_on


async def judge(reply: Reply, reference: Reply, go_on: GoOn, tie: float) -> Verdict:
    """Compare with the undisturbed reply; ask vLLM only where they differ."""
    if (reply.token_ids, reply.text) == (reference.token_ids, reference.text):
        return Verdict(Kind.EQUAL)
    said, expected = reply.token_ids, reference.token_ids
    first = _first_difference(said, expected)
    if first >= min(len(said), len(expected)) or reply.prompt_ids != reference.prompt_ids:
        return Verdict(Kind.UNEXPLAINED)
    position, gap, num_ties = first, 0.0, 0
    while position < len(said):
        new, tops = await go_on(reply.prompt_ids + said[:position], len(said) - position)
        if position == first:
            both = [tops[0].get(token, float("-inf")) for token in (said[first], expected[first])]
            gap = max(tops[0].values()) - min(both)
            if gap > tie:
                return Verdict(Kind.UNEXPLAINED, first, gap)
        at = _first_difference(new, said[position:])
        if position + at == len(said):
            break
        token = said[position + at]
        if at >= len(new) or max(tops[at].values()) - tops[at].get(token, float("-inf")) > tie:
            return Verdict(Kind.UNEXPLAINED, first, gap, num_ties)
        num_ties += 1
        position += at + 1
    return Verdict(Kind.NEAR_TIE, first, gap, num_ties)


def _first_difference(some: list[int], others: list[int]) -> int:
    """Where they differ first; the length of the shorter one if they do not until there."""
    pairs = zip(some, others, strict=False)
    length = min(len(some), len(others))
    return next((at for at, (one, other) in enumerate(pairs) if one != other), length)
