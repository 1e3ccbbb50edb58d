"""Which model gets how many engines where there are not GPUs enough for the most that all may have?

What a model always has is its own. Of the rest everybody who is asked for gets one engine, then
each what it has already, for moving an engine costs a start; then who has the fewest GPUs
with it gets one more, and so on. So what one model gives up another takes, and none that is asked
for stays without an engine for the sake of another's second.
"""

from collections.abc import Sequence

import msgspec


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What one model wants of the GPUs."""

    num_gpus: int  # of one engine
    num_least: int  # engines that it has in any case
    num_wanted: int  # engines
    num_held: int  # engines that it has, starting ones included


def share_out(claims: Sequence[Claim], num_gpus: int) -> list[int]:
    """Return how many engines each model gets, at most as many as it wants.

    All of `num_least` have to fit.
    """
    granted = [min(claim.num_least, claim.num_wanted) for claim in claims]
    left = num_gpus - sum(
        [num * claim.num_gpus for num, claim in zip(granted, claims, strict=True)]
    )
    rounds = [[min(1, claim.num_wanted) for claim in claims]]
    rounds.append([min(claim.num_held, claim.num_wanted) for claim in claims])
    rounds.append([claim.num_wanted for claim in claims])
    for upper in rounds:
        while True:
            poorest, fewest = -1, 0
            for index, claim in enumerate(claims):
                if granted[index] < upper[index] and claim.num_gpus <= left:
                    num_own = (granted[index] + 1) * claim.num_gpus
                    if poorest < 0 or num_own < fewest:
                        poorest, fewest = index, num_own
            if poorest < 0:
                break
            granted[poorest] += 1
            left -= claims[poorest].num_gpus
    return granted
