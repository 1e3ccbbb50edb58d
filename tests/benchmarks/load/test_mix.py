"""The mix of requests: the same for a seed, in the shares and sizes that were asked for."""

import itertools
import json
import statistics

import pytest

from benchmarks.load.mix import Mix


def test_a_seed_decides_everything() -> None:
    mix = Mix()
    first = mix.arrivals(rate=3.0, duration_s=60.0, seed="1")
    assert first == mix.arrivals(rate=3.0, duration_s=60.0, seed="1")
    assert first != mix.arrivals(rate=3.0, duration_s=60.0, seed="2")
    assert mix.messages(first[0], "a") == mix.messages(first[0], "a")


def test_shares_and_sizes() -> None:
    asks = list(itertools.islice(Mix().asks("sizes"), 1000))
    kinds = [ask.kind for ask in asks]
    assert all(
        kinds[start : start + 10].count("long") == 2 for start in range(0, len(kinds), 10)
    ), "every block of ten has two documents"
    for kind, smallest, largest in (("short", 8, 64), ("long", 600, 1500)):
        sizes = [ask.num_text_tokens for ask in asks if ask.kind == kind]
        assert smallest <= min(sizes) <= max(sizes) <= largest
        assert statistics.mean(sizes) == pytest.approx((smallest + largest) / 2, rel=0.1)
    outputs = [ask.num_output_tokens for ask in asks]
    assert (min(outputs), max(outputs)) == (8, 48)
    assert [ask.number for ask in asks] == list(range(1000))


def test_arrivals_have_their_count_and_spread() -> None:
    offsets_s = [ask.offset_s for ask in Mix().arrivals(rate=20.0, duration_s=100.0, seed="3")]
    assert len(offsets_s) == 2000
    assert offsets_s == sorted(offsets_s)
    assert 0.0 <= offsets_s[0] <= offsets_s[-1] <= 100.0
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(offsets_s)]
    # Exponential gaps: as wide as their mean.
    assert statistics.stdev(gaps_s) == pytest.approx(statistics.mean(gaps_s), rel=0.1)


def test_salt_changes_words_and_nothing_else() -> None:
    mix = Mix()
    asks = mix.arrivals(rate=2.0, duration_s=50.0, seed="4")
    texts = [mix.messages(ask, salt)[0]["content"] for salt in ("a", "b") for ask in asks]
    assert [len(text.split()) for text in texts] == 2 * [ask.num_text_tokens for ask in asks]
    # No two begin alike: a block of the prefix cache is longer than eight tokens.
    assert len({tuple(text.split()[:8]) for text in texts}) == len(texts)


def test_shared_prefix_is_one_text_per_group_and_salt() -> None:
    mix = Mix(num_groups=6)
    asks = list(itertools.islice(mix.asks("groups"), 200))
    systems = {(ask.group, mix.messages(ask, "a")[0]["content"]) for ask in asks}
    assert len(systems) == 6
    assert all(len(text.split()) == 400 for _, text in systems)
    others = {mix.messages(ask, "b")[0]["content"] for ask in asks}
    assert others.isdisjoint(text for _, text in systems)


def test_call_asks_for_exactly_so_many_tokens_and_for_usage() -> None:
    mix = Mix()
    ask = next(mix.asks("call"))
    body = json.loads(mix.call(ask, "some-model", "salt").body)
    assert body["model"] == "some-model"
    assert body["messages"] == mix.messages(ask, "salt")
    assert (body["max_tokens"], body["ignore_eos"]) == (ask.num_output_tokens, True)
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})
