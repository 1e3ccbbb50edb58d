"""What has come and what waits is counted for each model apart, under all of its names."""

from router import Usage
from tests.support.builders import info, make_router, req


def test_each_model_has_what_it_was_asked_for():
    router = make_router(0)
    router.expect_models(["a", "also-a", "b"])
    router.on_replica_up("r0", info(model="b"), now_s=0.0)
    for index, model in enumerate(("a", "also-a", "b")):
        router.on_arrival(req(str(index), num_tokens=100, model=model), 1.0)
    of_a, of_b = router.demand({"a", "also-a"}), router.demand({"b"})
    assert (of_a.num_requests_total, of_b.num_requests_total) == (2, 1)
    assert (of_a.num_prefill_tokens_total, of_b.num_prefill_tokens_total) == (200, 100)
    assert (of_a.num_held_requests, of_a.num_held_tokens, of_a.num_open_requests) == (2, 200, 2)
    assert (of_b.num_held_requests, of_b.num_open_requests) == (0, 1)
    assert (list(of_a.left_tokens), list(of_b.left_tokens)) == ([], ["r0"])
    assert of_a.rates is None
    assert of_b.rates is not None
    everything = router.demand()
    assert (everything.num_requests_total, everything.num_held_requests) == (3, 2)
    assert everything.num_open_requests == 3


def test_what_is_cached_of_one_models_prompts_says_nothing_of_anothers():
    router = make_router(0)
    for model in ("a", "b"):
        router.on_replica_up(model, info(model=model), now_s=0.0)
    for index in range(200):
        router.on_arrival(req(f"a{index}", num_tokens=100, model="a"), index)
        usage = Usage(num_prompt_tokens=100, num_cached_tokens=100, num_output_tokens=1)
        router.on_finish(f"a{index}", usage, index)
    router.on_arrival(req("b", num_tokens=100, model="b"), 200.0)
    assert router.demand({"a"}).num_prefill_tokens_total < 15_000
    assert router.demand({"b"}).num_prefill_tokens_total == 100
