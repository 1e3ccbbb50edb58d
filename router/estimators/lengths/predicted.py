"""Lengths by wording and by what was answered lately: the source that services use."""

import math

import msgspec

from router.estimators.lengths.distribution import Distribution
from router.estimators.lengths.error_shape import ErrorShape, ErrorShapeState
from router.estimators.lengths.forecast import Forecast, Lengths
from router.estimators.lengths.group_means import Group, GroupMean, GroupMeans
from router.estimators.lengths.learning_share import LearningShare
from router.estimators.lengths.text_model import TextModel
from router.estimators.output_length import PRIOR_TOKENS
from router.types import Request

# Mean absolute error of log(tokens) before anything is learned: another source's.
_PRIOR_SPREAD = 0.7
# The 80 % interval may hold so much less or more before the wording counts for less, and so much
# less before it counts for nothing.
_BAND, _LOST = 0.05, 0.2
# Of a system prompt that asks for a class's name; shorter answers are all alike.
_MIN_SPREAD = 0.03


class LearnedLengths(msgspec.Struct, frozen=True):
    """What is kept over a restart."""

    num_features: int  # of the weights that it belongs to
    groups: list[tuple[Group, GroupMean]]
    weights: dict[int, float]  # those that have changed
    shapes: dict[str, ErrorShapeState]  # by model


class PredictedLengths(Lengths):
    """From the widest to the narrowest: the text, the model, the tenant, its system prompt.

    The wording's score is a start. Each group of requests knows how long its answers were, and how
    far the score was right there. What is off then is kept as a distribution per model.
    """

    def __init__(self, text: TextModel, prior_log_tokens: float = math.log(PRIOR_TOKENS)) -> None:
        self._text = text
        self._prior = prior_log_tokens
        self._groups = GroupMeans()
        self._shapes: dict[str, ErrorShape] = {}
        self._share = LearningShare()

    def forecast(self, request: Request) -> Forecast:
        score = self._text.score(request.wording)
        mean, spread = self._predict(request, score)
        most = request.max_output_tokens
        highest = math.inf if most is None else float(most)
        said = Distribution(mean, spread, self._shape(request.model).quantiles(), highest)
        num_expected, num_booked = said.expected_and_booked()
        return Forecast(
            num_expected_tokens=num_expected, num_booked_tokens=num_booked, distribution=said
        )

    def wants(self, request: Request, now_s: float) -> bool:
        is_in_share = self._share.has(request.id, now_s)
        return is_in_share or not self._groups.knows_well(_groups(request)[-1])

    def learn(self, request: Request, num_output_tokens: int) -> None:
        num_each = max(1.0, num_output_tokens / request.num_sequences)
        score = self._text.score(request.wording)
        mean, spread = self._predict(request, score)
        shape = self._shape(request.model)
        length = math.log(num_each)
        error = (length - mean) / spread
        is_cut = request.max_output_tokens is not None and num_each >= request.max_output_tokens
        if is_cut:
            length = mean + spread * shape.mean_above(error)
        shape.learn(error, is_cut=is_cut)
        self._groups.learn(_groups(request), length, score, length - mean)
        if request.wording:
            self._text.learn(request.wording, length - mean)

    def coverage(self) -> dict[str, float]:
        """Return the share of late answers within their 80 % interval, by model."""
        return {model: shape.coverage for model, shape in self._shapes.items()}

    def state(self) -> LearnedLengths:
        """Return what is to be kept over a restart."""
        return LearnedLengths(
            num_features=len(self._text),
            groups=list(self._groups.groups.items()),
            weights=self._text.changed,
            shapes={model: shape.state() for model, shape in self._shapes.items()},
        )

    def restore(self, state: LearnedLengths) -> None:
        """Go on from what was kept, unless it belongs to other weights."""
        if state.num_features != len(self._text):
            return
        self._text.restore(state.weights)
        for group, found in state.groups:
            self._groups.groups[tuple(group)] = found
        for model, shape in state.shapes.items():
            self._shape(model).restore(shape)

    def _predict(self, request: Request, score: float) -> tuple[float, float]:
        """Return log(tokens) and its usual error."""
        shape = self._shape(request.model)
        # Where intervals do not hold what they say, the wording counts for less.
        trust = 1.0 - (abs(shape.coverage - 0.8) - _BAND) / (_LOST - _BAND)
        score *= min(1.0, max(0.0, trust))
        mean, spread = self._groups.predict(_groups(request), self._prior, score, _PRIOR_SPREAD)
        return mean, max(_MIN_SPREAD, spread)

    def _shape(self, model: str) -> ErrorShape:
        shape = self._shapes.get(model)
        if shape is None:
            shape = self._shapes[model] = ErrorShape()
        return shape


def _groups(request: Request) -> tuple[Group, ...]:
    """Return the groups that the request belongs to, the widest first."""
    limit = request.max_output_tokens
    wide: Group = (request.model,)
    middle: Group = (*wide, request.tenant, limit.bit_length() if limit is not None else None)
    if request.system_prompt:
        return wide, middle, (*middle, "system", request.system_prompt)
    return wide, middle, (*middle, "size", request.num_prompt_tokens.bit_length())
