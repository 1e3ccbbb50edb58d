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
_AGENTS_BLOCK_TOKENS = 64  # as they were recorded; 16 would take four times as long
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
    *,
    block_tokens: int = _BLOCK_TOKENS,
    think_median_s: float = _THINK_MEDIAN_S,
) -> Iterator[Arrival]:
    """Yield one conversation's requests.

    Its prompts share their history, and with the other sessions of its `group` the first
    `num_system_tokens`.
    """
    offset_s, num_history_tokens = start_s, num_system_tokens
    num_said_tokens = 0  # in the turn before
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
                    block_tokens, num_prompt_tokens + turn.num_reply_tokens + 1, block_tokens
                )
            ),
            prefix_block_tokens=block_tokens,
            num_said_tokens=num_said_tokens,
            num_heard_tokens=num_history_tokens if num_said_tokens else 0,
        )
        num_said_tokens = num_prompt_tokens
        num_history_tokens = num_prompt_tokens + turn.num_reply_tokens
        offset_s += _REPLY_BASE_S + _REPLY_S_PER_TOKEN * turn.num_reply_tokens
        offset_s += think_median_s * rng.lognormvariate(0.0, _THINK_SIGMA)


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


_FILES = LogNormal(25_000.0, 0.7, high=80_000)
_STEPS = LogNormal(650.0, 1.3, high=10_000)
_CALLS = LogNormal(220.0, 0.9, high=2_000)


@dataclass(frozen=True)
class CodingAgents:
    """Synthetic sessions of coding agents: long contexts that grow by a little, again and again.

    Sizes as in recorded ones (kv-cache-tester's): tools and instructions that all share, files that
    are read once, then short steps of a tool's output and a call of the next.
    """

    first: TokenCounts = _FILES
    step: TokenCounts = _STEPS
    reply: TokenCounts = _CALLS
    mean_num_turns: float = 40.0  # geometric, at least one
    num_system_tokens: int = 11_000
    max_context_tokens: int = 120_000  # a session ends before it
    tool_median_s: float = 4.0  # from a reply to what its call gives

    def arrivals(self, rate: float, num_sessions: int, seed: int) -> Iterator[Arrival]:
        """Yield the requests of so many sessions, begun at `rate` per second (Poisson)."""
        rng = random.Random(f"coding agents {seed}")
        sizes = np.random.default_rng([seed, 3])
        start_s = 0.0
        for session in range(num_sessions):
            start_s += rng.expovariate(rate)
            num_turns = int(sizes.geometric(1.0 / self.mean_num_turns))
            asked = [int(self.first.draw(sizes, 1)[0]), *self.step.draw(sizes, num_turns - 1)]
            replies = self.reply.draw(sizes, num_turns)
            turns: list[Turn] = []
            num_tokens = self.num_system_tokens
            for num_asked, num_replied in zip(asked, replies, strict=True):
                num_tokens += int(num_asked) + int(num_replied)
                if num_tokens > self.max_context_tokens:
                    break
                turns.append(Turn(int(num_asked), int(num_replied)))
            yield from play(
                turns,
                start_s,
                session,
                rng,
                self.num_system_tokens,
                block_tokens=_AGENTS_BLOCK_TOKENS,
                think_median_s=self.tool_median_s,
            )
