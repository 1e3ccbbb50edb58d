"""What is a predictor held against? Each learns from examples, and says log(tokens) of others."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.pipeline import make_pipeline

from benchmarks.policies.predictor.sources import Example, logs
from benchmarks.policies.predictor.training import matrix
from router.estimators.output_length import OutputLengths
from serving.gateway.intake.length.cues import FIRST_WORD

Learn = Callable[[Sequence[Example]], Callable[[Sequence[Example]], np.ndarray]]


def constant(known: Sequence[Example]) -> Callable[[Sequence[Example]], np.ndarray]:
    middle = float(np.median(logs(list(known))))
    return lambda asked: np.full(len(asked), middle)


def prompt_length(known: Sequence[Example]) -> Callable[[Sequence[Example]], np.ndarray]:
    model = LinearRegression().fit(_sizes(known), logs(list(known)))
    return lambda asked: model.predict(_sizes(asked))


def todays_means(known: Sequence[Example]) -> Callable[[Sequence[Example]], np.ndarray]:
    """By model and prompt size: what the router has without wording."""
    lengths = OutputLengths()
    for each in known:
        lengths.learn(each.request(), each.num_output_tokens)
    return lambda asked: np.log([lengths.predict(each.request()) for each in asked])


def histogram(known: Sequence[Example]) -> Callable[[Sequence[Example]], np.ndarray]:
    """The median per power of two of the prompt's size."""
    by_size: dict[int, list[float]] = defaultdict(list)
    for each, length in zip(known, logs(list(known)), strict=True):
        by_size[each.num_prompt_tokens.bit_length()].append(length)
    middle = float(np.median(logs(list(known))))
    medians = {size: float(np.median(found)) for size, found in by_size.items()}
    return lambda asked: np.array(
        [medians.get(each.num_prompt_tokens.bit_length(), middle) for each in asked]
    )


def tfidf_ridge(known: Sequence[Example]) -> Callable[[Sequence[Example]], np.ndarray]:
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), Ridge(alpha=1.0))
    model.fit([each.prompt for each in known], logs(list(known)))
    return lambda asked: model.predict([each.prompt for each in asked])


def lexical(known: Sequence[Example]) -> Callable[[Sequence[Example]], np.ndarray]:
    """Our cues alone, without words."""
    model = Ridge(alpha=1.0).fit(matrix(list(known))[:, :FIRST_WORD], logs(list(known)))
    return lambda asked: model.predict(matrix(list(asked))[:, :FIRST_WORD])


BASELINES: dict[str, Learn] = {
    "constant": constant,
    "prompt length": prompt_length,
    "today's means": todays_means,
    "histogram by log2(prompt)": histogram,
    "TF-IDF and ridge": tfidf_ridge,
    "cues alone": lexical,
}


def _sizes(examples: Sequence[Example]) -> np.ndarray:
    return np.log([[each.num_prompt_tokens] for each in examples])
