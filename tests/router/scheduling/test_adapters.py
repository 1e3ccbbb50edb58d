"""Requests go where their LoRA adapter is, unless it is sooner to load it elsewhere."""

import pytest

from router.core.router import Router
from router.types import AdapterState, Dispatch, Hold, Reject, RejectReason
from tests.support.builders import busy, make_router, req, snapshot

PATHS = {"a": "/a", "b": "/b"}
LORA = {"aliases": ("a", "b"), "adapters": PATHS, "max_loras": 1}
LOADED = {"load_s": {"a": 0.5, "b": 0.5}}


def router_of(*resident: str, seed: int = 0, **settings) -> Router:
    """A router of one engine per adapter named, which has it at hand; "" has none."""
    router = make_router(len(resident), engine=LORA, seed=seed, **settings)
    for index, name in enumerate(resident):
        tell(router, f"r{index}", 1, resident=[name] if name else [])
    return router


def tell(router: Router, replica_id: str, seq: int, paths=None, **state) -> None:
    router.on_snapshot(
        replica_id,
        snapshot(seq, adapters=AdapterState(**LOADED | state), adapter_paths=paths),
        float(seq),
    )


def placed(router: Router, request_id: str, model: str, num_tokens: int = 10, **fields) -> str:
    """Return the engine that a request is sent to."""
    [dispatch] = router.on_arrival(req(request_id, num_tokens, model=model, **fields), 2.0)
    assert isinstance(dispatch, Dispatch)
    return dispatch.replica_id


@pytest.mark.parametrize("seed", range(5))
def test_the_engine_that_has_it_is_preferred(seed):
    router = router_of("b", "a", "", seed=seed)
    assert [placed(router, f"a{number}", "a") for number in range(5)] == ["r1"] * 5
    assert [placed(router, f"b{number}", "b") for number in range(5)] == ["r0"] * 5


@pytest.mark.parametrize("seed", range(5))
def test_one_that_nobody_has_is_loaded_once_where_it_takes_no_others_place(seed):
    router = router_of("b", "", "b", seed=seed)
    assert [placed(router, f"a{number}", "a") for number in range(5)] == ["r1"] * 5


@pytest.mark.parametrize("seed", range(5))
def test_it_is_loaded_elsewhere_where_that_is_sooner(seed):
    router = router_of("a", "", seed=seed)
    tell(router, "r0", 2, resident=["a"])
    router.on_snapshot("r0", snapshot(3, num_pending_prefill_tokens=9000, num_waiting_reqs=9), 2.0)
    assert placed(router, "one", "a") == "r1"


def test_an_engine_that_has_enough_to_prefill_is_waited_for_if_loading_takes_longer():
    """It accepts nothing more, but to load the adapter elsewhere takes longer than its step."""
    router = router_of("a", "")
    pending = {"num_pending_prefill_tokens": 300, "num_waiting_reqs": 1}
    router.on_snapshot("r0", snapshot(2, **pending), 2.0)
    assert placed(router, "base", "m") == "r1"
    assert placed(router, "one", "a") == "r0"


def test_it_waits_inside_an_engine_only_if_that_is_shorter_than_elsewhere():
    """Both engines use another adapter; where one of its requests is left, room comes sooner."""
    router = router_of("b", "b")
    tell(router, "r0", 2, resident=["b"], num_requests={"b": 4})
    tell(router, "r1", 2, resident=["b"], num_requests={"b": 1})
    assert placed(router, "one", "a", num_expected_output_tokens=1000) == "r1"


def test_loading_is_part_of_the_predicted_first_token():
    router = router_of("a")
    assert placed(router, "near", "a") == "r0"
    near_s = router.discipline.predicted_ttft_s("near")
    router.on_finish("near", None, 3.0)
    assert placed(router, "far", "b") == "r0"
    assert router.discipline.predicted_ttft_s("far") >= near_s + 0.5


def test_the_base_model_and_its_other_names_wait_for_no_adapter():
    router = make_router(1, engine=LORA | {"aliases": ("other", "a", "b")})
    tell(router, "r0", 1, resident=["a"], num_requests={"a": 1})
    ttfts_s = set()
    for name in ("m", "other"):
        placed(router, name, name)
        ttfts_s.add(router.discipline.predicted_ttft_s(name))
        router.on_cancel(name, 2.0)
    assert len(ttfts_s) == 1
    assert router.state(2.0).replicas["r0"].adapters.num_requests == {"a": 1}


def test_an_adapter_comes_and_goes_while_its_engine_works():
    router = make_router(2, engine={"max_loras": 1})
    assert router.on_arrival(req("early", model="a"), 1.0) == [
        Reject("early", RejectReason.UNKNOWN_MODEL)
    ]
    tell(router, "r1", 1, {"a": "/a"}, resident=["a"])
    assert placed(router, "one", "a") == "r1"
    assert {placed(router, f"base{number}", "m") for number in range(8)} == {"r0", "r1"}
    tell(router, "r1", 2, {})
    assert router.on_arrival(req("late", model="a"), 2.0) == [
        Reject("late", RejectReason.UNKNOWN_MODEL)
    ]
    assert router.on_finish("one", None, 3.0) == []
    assert router.state(3.0).replicas["r1"].info.adapters == {}


def test_what_comes_back_for_an_adapter_that_nobody_serves_any_more_is_not_held():
    router = make_router(2, engine={"max_loras": 1})
    tell(router, "r1", 1, {"a": "/a"}, resident=["a"])
    assert placed(router, "busy", "a") == placed(router, "lost", "a") == "r1"
    tell(router, "r1", 2, {})
    gone = [Reject("busy", RejectReason.UNKNOWN_MODEL)]
    assert router.failures.on_refused_as_busy("busy", "r1", 3.0) == gone
    gone = [Reject("lost", RejectReason.UNKNOWN_MODEL)]
    assert (
        router.on_replica_down("r1", 3.0)
        + router.failures.on_attempt_failed("lost", "r1", None, 3.0)
        == gone
    )


def test_an_engine_that_unloads_what_it_is_reserved_for_is_free_for_others():
    router = make_router(2, engine=LORA)
    free = {"r0": 10, "r1": 600}  # tokens; `big` wants more
    for replica_id, num_free in free.items():
        router.on_snapshot(replica_id, busy(1, num_free_kv_tokens=num_free), 1.0)
    assert router.on_arrival(req("big", 900, model="a"), 1.0) == [Hold("big")]
    assert router.on_arrival(req("early", 150, arrival_s=1.0), 1.0) == [Hold("early")]
    decisions = router.on_snapshot(
        "r1", busy(2, num_free_kv_tokens=600, adapter_paths={"b": "/b"}), 2.0
    )
    [dispatch] = decisions  # r1 was reserved for what it can serve no more
    assert (dispatch.request_id, dispatch.replica_id) == ("early", "r1")


def test_the_state_shows_what_is_at_hand():
    router = router_of("a", "")
    placed(router, "one", "a")
    states = router.state(2.0).replicas
    assert (states["r0"].adapters.resident, states["r1"].adapters.resident) == (["a"], [])
    assert states["r0"].adapters.num_requests == {"a": 1}
    assert make_router(1).state(1.0).replicas["r0"].adapters is None
