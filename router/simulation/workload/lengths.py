"""How many tokens do prompts and replies have? Drawn: integers, [num_requests]."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LogNormal:
    """Most counts are near the median, a few far above it, as in chat.

    Counts outside `low` to `high` are set to the bound.
    """

    median: float
    sigma: float  # of the logarithm: 1 puts one in forty above 7 medians
    low: int = 1
    high: int = 1 << 20

    def draw(self, rng: np.random.Generator, num_requests: int) -> NDArray[np.int_]:
        """Return so many counts, [num_requests]."""
        counts = self.median * np.exp(self.sigma * rng.standard_normal(num_requests))
        return np.clip(np.rint(counts), self.low, self.high).astype(int)


@dataclass(frozen=True)
class BoundedPareto:
    """A power law between two bounds: the heaviest tail of these."""

    low: int
    high: int
    alpha: float = 1.1  # towards 1 the few largest carry as much as all others

    def draw(self, rng: np.random.Generator, num_requests: int) -> NDArray[np.int_]:
        """Return so many counts, [num_requests], by the inverse distribution function."""
        share = 1.0 - (self.low / self.high) ** self.alpha
        uniform = rng.uniform(0.0, 1.0, num_requests)
        counts = self.low * (1.0 - uniform * share) ** (-1.0 / self.alpha)
        rounded: NDArray[np.float64] = np.rint(counts)
        return rounded.astype(int)


@dataclass(frozen=True)
class Mixture:
    """For each request one of several kinds, drawn by their shares: chat and documents, say."""

    kinds: tuple["LogNormal | BoundedPareto", ...]
    shares: tuple[float, ...]

    def draw(self, rng: np.random.Generator, num_requests: int) -> NDArray[np.int_]:
        """Return so many counts, [num_requests]."""
        shares = np.array(self.shares) / sum(self.shares)
        which = rng.choice(len(self.kinds), num_requests, p=shares)
        drawn = np.stack([kind.draw(rng, num_requests) for kind in self.kinds])
        counts: NDArray[np.int_] = drawn[which, np.arange(num_requests)]
        return counts


TokenCounts = LogNormal | BoundedPareto | Mixture
