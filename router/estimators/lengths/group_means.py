"""How long were answers in the groups that a request belongs to, beside what its wording says?"""

from collections import OrderedDict

import msgspec

# The wider group weighs as much as this many answers of the narrower one: `output_length`.
_SHRINKAGE = 8.0
# So many answers say as much of how far the wording can be trusted here as is known elsewhere.
_SLOPE_SHRINKAGE = 40.0
_SCORE_VARIANCE = 0.3  # of the wording's scores, usual
_MEMORY_ANSWERS = 256.0
_WELL_KNOWN = 64.0  # answers
_MAX_GROUPS = 20_000

Group = tuple[str | int | None, ...]


class GroupMean(msgspec.Struct):
    """Decayed means over the answers of one group, as of log(tokens)."""

    weight: float = 0.0
    mean: float = 0.0
    score: float = 0.0  # of their wording
    variance: float = 0.0  # of the scores
    covariance: float = 0.0  # of scores and lengths
    spread: float = 0.0  # mean absolute error of what was predicted

    def add(self, length: float, score: float, error: float) -> None:
        """Count an answer; one counts 1/e after `_MEMORY_ANSWERS` later ones."""
        self.weight = self.weight * (1.0 - 1.0 / _MEMORY_ANSWERS) + 1.0
        share = 1.0 / self.weight
        above, above_score = length - self.mean, score - self.score
        self.mean += share * above
        self.score += share * above_score
        self.variance += share * (above_score * (score - self.score) - self.variance)
        self.covariance += share * (above_score * (length - self.mean) - self.covariance)
        self.spread += share * (abs(error) - self.spread)


class GroupMeans:
    """Means by group, each pulled towards the next wider one (empirical Bayes)."""

    def __init__(self) -> None:
        self.groups: OrderedDict[Group, GroupMean] = OrderedDict()  # least recently used first

    def predict(
        self, groups: tuple[Group, ...], prior: float, score: float, spread: float
    ) -> tuple[float, float]:
        """Return log(tokens) and its mean absolute error; the widest of `groups` comes first.

        `prior` is what there is where nothing was learned, of a wording that scores 0.
        """
        mean, slope = prior + score, 1.0
        for group in groups:
            found = self.groups.get(group)
            if found is None:
                continue
            weight = found.weight
            own = weight * found.variance
            known = _SLOPE_SHRINKAGE * _SCORE_VARIANCE
            slope = (weight * found.covariance + known * slope) / (own + known)
            slope = min(1.5, max(0.0, slope))
            here = found.mean + slope * (score - found.score)
            mean = (weight * here + _SHRINKAGE * mean) / (weight + _SHRINKAGE)
            spread = (weight * found.spread + _SHRINKAGE * spread) / (weight + _SHRINKAGE)
        return mean, spread

    def knows_well(self, group: Group) -> bool:
        """Whether a group's own answers say more than those of wider ones, by far."""
        found = self.groups.get(group)
        return found is not None and found.weight >= _WELL_KNOWN

    def learn(self, groups: tuple[Group, ...], length: float, score: float, error: float) -> None:
        """Count an answer of so many log(tokens), predicted with such an error."""
        for group in groups:
            found = self.groups.get(group)
            if found is None:
                found = self.groups[group] = GroupMean()
            self.groups.move_to_end(group)
            found.add(length, score, error)
        while len(self.groups) > _MAX_GROUPS:
            self.groups.popitem(last=False)
