"""The wording's score: what a feature adds, and what answers teach of it."""

import pytest

from router.estimators.lengths.text_model import TextModel

CUE, WORD, OTHER = 1, 10, 11


def test_cues_add_up_and_words_share_one():
    weights = [0.0] * 12
    weights[CUE], weights[WORD], weights[OTHER] = -1.0, 2.0, 4.0
    text = TextModel(weights, num_meanings=8)
    assert text.score((CUE,)) == -1.0
    assert text.score((CUE, WORD)) == 1.0
    assert text.score((CUE, WORD, OTHER)) == pytest.approx(-1.0 + 6.0 / 2**0.5)
    assert text.score(()) == text.score((99,)) == 0.0  # of another version's features


def test_a_word_that_always_comes_with_longer_answers_is_learned():
    text = TextModel([0.0] * 12, num_meanings=8)
    for _ in range(30):
        for features, length in (((WORD,), 1.5), ((OTHER,), -0.5)):
            text.learn(features, length - text.score(features))
    assert text.score((WORD,)) == pytest.approx(1.5, abs=0.1)
    assert text.score((OTHER,)) == pytest.approx(-0.5, abs=0.1)


def test_what_was_learned_is_restored():
    text, other = (TextModel([0.0] * 12, num_meanings=8) for _ in range(2))
    text.learn((CUE, WORD), 1.0)
    other.restore({**text.changed, 500: 3.0})
    assert other.score((CUE, WORD)) == text.score((CUE, WORD)) != 0.0
