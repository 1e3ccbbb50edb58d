"""What does the wording of a request say of its answer's length?

A linear model of log(tokens) over what the shell has found in the instruction
(`serving.gateway.intake.length`): hashed words and pairs of words, and features with a meaning of
their own, such as "asks for one sentence". It comes trained, and goes on learning from each answer.
"""

import array
import bisect
import math
from collections.abc import Sequence

# Deviation of log(tokens) that the wording does not explain, squared: 0.4 to 0.6 in all sources
# seen. And of what a feature weighs elsewhere than where it was learned; words all together.
_NOISE = 0.5
# More adapts faster to another source (tau after 500 answers there 0.30 to 0.38) and forgets what
# was right here (0.54 to 0.51).
_MEANING_VARIANCE = 0.01
_WORD_VARIANCE = 0.2


class TextModel:
    """Weights by feature; the first `num_meanings` features count one each, words share one.

    Features ascend. Of an instruction of n words each counts 1/√n: long ones do not outweigh what
    they ask for.
    Learning is a Kalman filter with a diagonal covariance that does not shrink, so old answers are
    forgotten as new ones with the same words come (normalised LMS; Haykin 2002).
    """

    def __init__(self, weights: Sequence[float], num_meanings: int) -> None:
        # Of many few are looked at per request: a list would be four times as much memory.
        self._weights = array.array("d", weights)
        self._num_meanings = num_meanings
        self.changed: dict[int, float] = {}  # weights that differ from the trained ones

    def __len__(self) -> int:
        return len(self._weights)

    def score(self, features: tuple[int, ...]) -> float:
        """Return what is to be expected of log(tokens) more than usual; 0 without features."""
        weigh = self._weights.__getitem__
        first, end = self._bounds(features)
        meaning = sum(map(weigh, features[:first]))
        if first == end:
            return meaning
        return meaning + sum(map(weigh, features[first:end])) / math.sqrt(end - first)

    def learn(self, features: tuple[int, ...], error: float) -> None:
        """Move the weights towards an answer whose log(tokens) was so much higher than expected."""
        weights, changed = self._weights, self.changed
        first, end = self._bounds(features)
        num_words = end - first
        variance = _MEANING_VARIANCE * first + (_WORD_VARIANCE if num_words else 0.0)
        step = error / (_NOISE + variance)
        for feature in features[:first]:
            weights[feature] += _MEANING_VARIANCE * step
            changed[feature] = weights[feature]
        if num_words:
            word_step = _WORD_VARIANCE * step / math.sqrt(num_words)
            for feature in features[first:end]:
                weights[feature] += word_step
                changed[feature] = weights[feature]

    def _bounds(self, features: tuple[int, ...]) -> tuple[int, int]:
        """Return where words begin among the features, and where those that are known end."""
        first = bisect.bisect_left(features, self._num_meanings)
        return first, bisect.bisect_left(features, len(self._weights), first)

    def restore(self, changed: dict[int, float]) -> None:
        """Take in weights that were learned before."""
        for feature, weight in changed.items():
            if 0 <= feature < len(self._weights):
                self._weights[feature] = weight
                self.changed[feature] = weight
