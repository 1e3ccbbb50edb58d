"""Did a failure change what a reply says? The questions for real engines, and their judge.

A greedy reply is *equal* to the undisturbed one, token by token. Or *near ties* explain the
difference: up to the first different token both agree; there vLLM itself gives both tokens the
same probability within a rounding error; and from the reply's own tokens vLLM continues as the
reply does, except for further near ties, after each of which it is asked again. Any other reply
is *unexplained*.
"""

import enum
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx

from benchmarks.chaos.client import Question, Reply
from serving.capacity.launch import MeasureError

# How much another order of summation may change. bfloat16: two steps between neighbouring numbers
# at the size of logits (up to 32). float32: some hundred such steps, added up over the layers.
TIE_NATS = {"bfloat16": 0.25, "float32": 0.002}
_NUM_TOP = 5

_TOPICS = (
    "the water cycle", "the French Revolution", "how bread is made", "the planet Mars",
    "how a bicycle works", "the history of chess", "why the sky is blue", "the human heart",
    "how rivers form", "the Roman Empire", "what photosynthesis is", "how a camera works",
)  # fmt: skip
_TIMEOUT = httpx.Timeout(120.0)


def questions(num_tokens: tuple[int, ...] = (40, 70, 100)) -> list[Question]:
    """Return chats, completions and documents, most of them streamed.

    A failure interrupts each kind in another state: while decoding, prefilling or buffering.
    """
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
    """Return a few hundred tokens: at least two steps of prefill."""
    return "Read this first. " + " ".join(
        f"Note {number} about {topic} was written on day {number * 7 % 31} by reader {number}."
        for number in range(1, 22)
    )


class VerdictKind(enum.Enum):
    """How a reply compares with the undisturbed one."""

    EQUAL = "equal"
    NEAR_TIE = "near tie"
    UNEXPLAINED = "unexplained"


@dataclass(frozen=True)
class Verdict:
    """The judgement of one reply. Positions count its output tokens from 0."""

    kind: VerdictKind
    first_difference: int | None = None
    gap: float = 0.0  # nats between the two tokens there
    num_ties: int = 0  # after which vLLM was asked again


# From token ids and a number of tokens to vLLM's continuation, at most so long: its ids, and for
# each position the log probabilities of the likeliest tokens.
Continue = Callable[[list[int], int], Awaitable[tuple[list[int], list[dict[int, float]]]]]


def vllm_continuation(http: httpx.AsyncClient, model: str, *, ignore_eos: bool) -> Continue:
    """Return a function that asks the service to continue from token ids, as any client may."""

    async def continue_from(token_ids: list[int], num_tokens: int) -> tuple[list[int], list[dict]]:
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

    return continue_from


async def judge(reply: Reply, reference: Reply, continue_from: Continue, tie: float) -> Verdict:
    """Compare a reply with the undisturbed one. Ask vLLM only if they differ."""
    if (reply.token_ids, reply.text) == (reference.token_ids, reference.text):
        return Verdict(VerdictKind.EQUAL)
    said, expected = reply.token_ids, reference.token_ids
    first = _first_difference(said, expected)
    if first >= min(len(said), len(expected)) or reply.prompt_ids != reference.prompt_ids:
        return Verdict(VerdictKind.UNEXPLAINED)
    position, gap, num_ties = first, 0.0, 0
    while position < len(said):
        new, tops = await continue_from(reply.prompt_ids + said[:position], len(said) - position)
        if position == first:
            both = [tops[0].get(token, float("-inf")) for token in (said[first], expected[first])]
            gap = max(tops[0].values()) - min(both)
            if gap > tie:
                return Verdict(VerdictKind.UNEXPLAINED, first, gap)
        at = _first_difference(new, said[position:])
        if position + at == len(said):
            break
        token = said[position + at]
        if at >= len(new) or max(tops[at].values()) - tops[at].get(token, float("-inf")) > tie:
            return Verdict(VerdictKind.UNEXPLAINED, first, gap, num_ties)
        num_ties += 1
        position += at + 1
    return Verdict(VerdictKind.NEAR_TIE, first, gap, num_ties)


def _first_difference(some: list[int], others: list[int]) -> int:
    """Return where the lists differ first; the shorter one's length if one begins the other."""
    pairs = zip(some, others, strict=False)
    length = min(len(some), len(others))
    return next((at for at, (one, other) in enumerate(pairs) if one != other), length)
