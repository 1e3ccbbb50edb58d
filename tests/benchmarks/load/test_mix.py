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
    requests = list(itertools.islice(Mix().requests("sizes"), 1000))
    kinds = [request.kind for request in requests]
    assert all(
        kinds[start : start + 10].count("long") == 2 for start in range(0, len(kinds), 10)
    ), "every block of ten has two documents"
    for kind, smallest, largest in (("short", 8, 64), ("long", 600, 1500)):
        sizes = [request.num_text_tokens for request in requests if request.kind == kind]
        assert smallest <= min(sizes) <= max(sizes) <= largest
        assert statistics.mean(sizes) == pytest.approx((smallest + largest) / 2, rel=0.1)
    outputs = [request.num_output_tokens for request in requests]
    assert (min(outputs), max(outputs)) == (8, 48)
    assert [request.number for request in requests] == list(range(1000))


def test_arrivals_have_their_count_and_spread() -> None:
    offsets_s = [
        request.offset_s for request in Mix().arrivals(rate=20.0, duration_s=100.0, seed="3")
    ]
    assert len(offsets_s) == 2000
    assert offsets_s == sorted(offsets_s)
    assert 0.0 <= offsets_s[0] <= offsets_s[-1] <= 100.0
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(offsets_s)]
    # Exponential gaps: as wide as their mean.
    assert statistics.stdev(gaps_s) == pytest.approx(statistics.mean(gaps_s), rel=0.1)


def test_salt_changes_words_and_nothing_else() -> None:
    mix = Mix()
    requests = mix.arrivals(rate=2.0, duration_s=50.0, seed="4")
    texts = [
        mix.messages(request, salt)[0]["content"] for salt in ("a", "b") for request in requests
    ]
    assert [len(text.split()) for text in texts] == 2 * [
        request.num_text_tokens for request in requests
    ]
    # No two begin alike: a block of the prefix cache is longer than eight tokens.
    assert len({tuple(text.split()[:8]) for text in texts}) == len(texts)


def test_shared_prefix_is_one_text_per_group_and_salt() -> None:
    mix = Mix(num_groups=6)
    requests = list(itertools.islice(mix.requests("groups"), 200))
    systems = {(request.group, mix.messages(request, "a")[0]["content"]) for request in requests}
    assert len(systems) == 6
    assert all(len(text.split()) == 400 for _, text in systems)
    others = {mix.messages(request, "b")[0]["content"] for request in requests}
    assert others.isdisjoint(text for _, text in systems)


def test_api_request_asks_for_exactly_so_many_tokens_and_for_usage() -> None:
    mix = Mix()
    request = next(mix.requests("call"))
    body = json.loads(mix.api_request(request, "some-model", "salt").body)
    assert body["model"] == "some-model"
    assert body["messages"] == mix.messages(request, "salt")
    assert (body["max_tokens"], body["ignore_eos"]) == (request.num_output_tokens, True)
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})
