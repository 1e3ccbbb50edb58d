import pytest

from router.estimators.prefix_reuse import PrefixReuse


def test_nothing_is_taken_to_be_cached_until_it_was():
    assert PrefixReuse().share("m") == 0.0


def test_the_share_is_of_tokens_and_of_each_model_alone():
    reuse = PrefixReuse()
    for _ in range(300):
        reuse.record_placed("m", 1000, 0)
        reuse.record_placed("m", 9000, 9000)
        reuse.record_placed("other", 100, 0)
    assert reuse.share("m") == pytest.approx(0.9, abs=0.01)
    assert reuse.share("other") == 0.0


def test_it_follows_what_comes():
    reuse = PrefixReuse()
    for num_cached in [1000] * 300 + [0] * 300:
        reuse.record_placed("m", 1000, num_cached)
    assert reuse.share("m") < 0.02
