"""What is asked of real engines under chaos, and how their replies are judged.

A greedy reply is *equal* to the one of an undisturbed run, token by token, or a
*near tie*: then vLLM itself, given the prompt and the reply's own tokens, ranks
every single one of them first or within a rounding error of the first, so that
another batch is enough to turn the choice. Anything else is *unexplained*.
"""

import enum
import itertools
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.chaos_client import Question, Reply

# Two neighbouring numbers of the type that logits are computed in lie so far apart, at
# the size that they have (up to 32): what adding up in another order may turn. Float32
# adds up a few hundred such errors over the layers.
TIE_NATS = {"bfloat16": 0.25, "float32": 0.002}

_TOPICS = (
    "the water cycle", "the French Revolution", "how bread is made", "the planet Mars",
    "how a bicycle works", "the history of chess", "why the sky is blue", "the human heart",
    "how rivers form", "the Roman Empire", "what photosynthesis is", "how a camera works",
)  # fmt: skip
_TIMEOUT = httpx.Timeout(120.0)


def questions(num_tokens: tuple[int, ...] = (60, 100, 140)) -> list[Question]:
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
    NEAR_TIE = "near tie, shown by vLLM's own log probabilities"
    UNEXPLAINED = "unexplained"


@dataclass(frozen=True)
class Verdict:
    """About one reply; positions count the answer's tokens from 0."""

    kind: Kind
    first_difference: int | None = None
    gap: float = 0.0  # nats that the token there lacks to the first, given what comes before
    widest_gap: float = 0.0  # over all tokens of the reply


async def gaps(http: httpx.AsyncClient, model: str, reply: Reply) -> list[float]:
    """Return by how many nats vLLM ranks each token of the reply below the first.

    All in one prefill of prompt and reply: 0 is the greedy choice.
    """
    body = {
        "model": model,
        "prompt": reply.prompt_ids + reply.token_ids,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 1,
    }
    response = await http.post("/v1/completions", json=body, timeout=_TIMEOUT)
    response.raise_for_status()
    per_token = response.json()["choices"][0]["prompt_logprobs"]
    return gaps_of(per_token[len(reply.prompt_ids) :], reply.token_ids)


def gaps_of(per_token: list[dict[str, Any]], token_ids: list[int]) -> list[float]:
    """The same from vLLM's `prompt_logprobs`, which name the token itself and the first."""
    found = []
    for logprobs, token_id in zip(per_token, token_ids, strict=True):
        best = max(each["logprob"] for each in logprobs.values())
        found.append(best - logprobs[str(token_id)]["logprob"])
    return found


def judge(reply: Reply, reference: Reply, own_gaps: list[float] | None, tie: float) -> Verdict:
    """Compare with the undisturbed reply; `own_gaps` are needed only if they differ."""
    if (reply.token_ids, reply.text) == (reference.token_ids, reference.text):
        return Verdict(Kind.EQUAL)
    if own_gaps is None or reply.prompt_ids != reference.prompt_ids:
        return Verdict(Kind.UNEXPLAINED)
    first = next(
        (
            position
            for position, (mine, other) in enumerate(
                itertools.zip_longest(reply.token_ids, reference.token_ids)
            )
            if mine != other
        ),
        None,
    )
    if first is None or first >= len(own_gaps):  # the same tokens say something else, or too few
        return Verdict(Kind.UNEXPLAINED, first, 0.0, max(own_gaps, default=0.0))
    is_tie = max(own_gaps) <= tie
    return Verdict(
        Kind.NEAR_TIE if is_tie else Kind.UNEXPLAINED, first, own_gaps[first], max(own_gaps)
    )
