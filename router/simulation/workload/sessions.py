"""When do the turns of conversations arrive, and what do their prompts share?

Each turn's prompt is everything said before and a new question. Open loop: the time of the next
turn is drawn before the run, from how long a reply usually takes and how long people think. An
overloaded server thus gets the second question while it is still busy with the first. Users who
waited for the reply would spare it that, and hide the overload.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from router.simulation.workload.lengths import LogNormal, TokenCounts
from router.simulation.workload.workload import Arrival

# Fine enough for every engine's blocks (vLLM: 16 tokens or a multiple).
_BLOCK_TOKENS = 16
# A usual reply: half a second to its first token, then 25 ms per token.
_REPLY_BASE_S = 0.5
_REPLY_S_PER_TOKEN = 0.025
# Reading and typing: a median of 15 s, one in twenty more than 80 s.
_THINK_MEDIAN_S = 15.0
_THINK_SIGMA = 1.0


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its reply, tokens."""

    num_question_tokens: int
    num_reply_tokens: int


def play(
    turns: Iterable[Turn],
    start_s: float,
    session: int,
    rng: random.Random,
    num_system_tokens: int = 0,
    group: int = 0,
) -> Iterator[Arrival]:
    """Yield one conversation's requests.

    Its prompts share their history, and with the other sessions of its `group` the first
    `num_system_tokens`.
    """
    offset_s, num_history_tokens = start_s, num_system_tokens
    for turn in turns:
        num_prompt_tokens = num_history_tokens + turn.num_question_tokens
        yield Arrival(
            offset_s=offset_s,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=turn.num_reply_tokens,
            session=str(session),
            prefix_ids=tuple(
                # Even numbers are the group's text, odd ones the session's own.
                group * 2 if end <= num_system_tokens else session * 2 + 1
                for end in range(
                    _BLOCK_TOKENS, num_prompt_tokens + turn.num_reply_tokens + 1, _BLOCK_TOKENS
                )
            ),
            prefix_block_tokens=_BLOCK_TOKENS,
        )
        num_history_tokens = num_prompt_tokens + turn.num_reply_tokens
        offset_s += _REPLY_BASE_S + _REPLY_S_PER_TOKEN * turn.num_reply_tokens
        offset_s += _THINK_MEDIAN_S * rng.lognormvariate(0.0, _THINK_SIGMA)


_QUESTIONS = LogNormal(60.0, 1.0, high=4_000)
_REPLIES = LogNormal(200.0, 0.8, high=2_000)


@dataclass(frozen=True)
class Conversations:
    """Synthetic conversations: sizes without text."""

    question: TokenCounts = _QUESTIONS
    reply: TokenCounts = _REPLIES
    mean_num_turns: float = 4.0  # geometric, at least one
    num_groups: int = 6  # system prompts in use
    num_system_tokens: int = 800

    def arrivals(self, rate: float, num_sessions: int, seed: int) -> Iterator[Arrival]:
        """Yield the requests of so many conversations, begun at `rate` per second (Poisson)."""
        rng = random.Random(f"conversations {seed}")
        sizes = np.random.default_rng([seed, 1])
        start_s = 0.0
        for session in range(num_sessions):
            start_s += rng.expovariate(rate)
            num_turns = int(sizes.geometric(1.0 / self.mean_num_turns))
            questions = self.question.draw(sizes, num_turns)
            replies = self.reply.draw(sizes, num_turns)
            turns = [Turn(int(q), int(r)) for q, r in zip(questions, replies, strict=True)]
            group = rng.randrange(self.num_groups)
            yield from play(turns, start_s, session, rng, self.num_system_tokens, group)
