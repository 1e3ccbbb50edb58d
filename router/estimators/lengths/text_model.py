"""What does the wording of a request say of its answer's length?

A linear model of log(tokens) over what the shell has found in the instruction
(`serving.gateway.intake.length`): hashed words and pairs of words, and features with a meaning of
their own, such as "asks for one sentence". It comes trained, and goes on learning from each answer.
"""

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

    Of an instruction of n words each counts 1/√n: long ones do not outweigh what they ask for.
    Learning is a Kalman filter with a diagonal covariance that does not shrink, so old answers are
    forgotten as new ones with the same words come (normalised LMS; Haykin 2002).
    """

    def __init__(self, weights: Sequence[float], num_meanings: int) -> None:
        self._weights: list[float] = list(weights)
        self._num_meanings = num_meanings
        self.changed: dict[int, float] = {}  # weights that differ from the trained ones

    def __len__(self) -> int:
        return len(self._weights)

    def score(self, features: tuple[int, ...]) -> float:
        """Return what is to be expected of log(tokens) more than usual; 0 without features."""
        weights, num_meanings, num_weights = self._weights, self._num_meanings, len(self._weights)
        meaning, words, num_words = 0.0, 0.0, 0
        for feature in features:
            if feature >= num_weights:
                continue
            if feature < num_meanings:
                meaning += weights[feature]
            else:
                words += weights[feature]
                num_words += 1
        return meaning + words / math.sqrt(num_words) if num_words else meaning

    def learn(self, features: tuple[int, ...], error: float) -> None:
        """Move the weights towards an answer whose log(tokens) was so much higher than expected."""
        known = [each for each in features if each < len(self._weights)]
        num_words = sum([each >= self._num_meanings for each in known])
        variance = _MEANING_VARIANCE * (len(known) - num_words)
        if num_words:
            variance += _WORD_VARIANCE
        step = error / (_NOISE + variance)
        word_step = _WORD_VARIANCE * step / math.sqrt(max(1, num_words))
        for feature in known:
            moved = word_step if feature >= self._num_meanings else _MEANING_VARIANCE * step
            self._weights[feature] += moved
            self.changed[feature] = self._weights[feature]

    def restore(self, changed: dict[int, float]) -> None:
        """Take in weights that were learned before."""
        for feature, weight in changed.items():
            if 0 <= feature < len(self._weights):
                self._weights[feature] = weight
                self.changed[feature] = weight
