"""Short ways to say what a test needs. Every default can be overridden."""

from typing import Any

import msgspec

from router.core.router import Router
from router.core.settings import RouterSettings
from router.fleet.replica import Replica
from router.resilience.breaker import Failure
from router.simulation.engine.profile import Profile
from router.types import Decision, EngineInfo, EngineSnapshot, Request


def req(request_id: str = "a", num_tokens: int = 10, **fields: Any) -> Request:
    """A request for model `m`."""
    return Request(**{"id": request_id, "model": "m", "num_prompt_tokens": num_tokens} | fields)


def info(**fields: Any) -> EngineInfo:
    """An engine of model `m`: steps of 100 tokens, 8 sequences, 10,000 tokens of KV."""
    defaults = {
        "model": "m",
        "tasks": ("generate",),
        "max_model_len": 4096,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 100,
        "num_kv_tokens": 10_000,
        "block_size": 16,
    }
    return EngineInfo(**defaults | fields)


def snapshot(seq: int = 1, **fields: Any) -> EngineSnapshot:
    """An idle engine's state, all of its KV cache free."""
    return EngineSnapshot(**{"seq": seq, "num_free_kv_tokens": 10_000} | fields)


def busy(seq: int = 1, **fields: Any) -> EngineSnapshot:
    """The state of an engine that decodes one request and has nothing to prefill."""
    return snapshot(seq, **{"num_running_reqs": 1, "num_decoding_reqs": 1} | fields)


def stepped(seq: int, step_s: float, *, prefill: int = 0, decodes: int = 0) -> EngineSnapshot:
    """A state whose last step took `step_s` for so much work."""
    return snapshot(
        seq,
        step_s=step_s,
        step_num_prefill_tokens=prefill,
        step_num_decode_reqs=decodes,
        num_steps_total=seq,
    )


def make_replica(replica_id: str = "r0", **fields: Any) -> Replica:
    """A replica that has not reported yet; fields are those of its `EngineInfo`."""
    return Replica(replica_id, info(**fields), now_s=0.0)


def make_router(
    num_replicas: int = 1, engine: dict[str, Any] | None = None, **settings: Any
) -> Router:
    """A router with replicas r0, r1, … of model `m`, up since 0 s and idle."""
    router = Router(RouterSettings(**settings))
    for index in range(num_replicas):
        router.on_replica_up(f"r{index}", info(**engine or {}), now_s=0.0)
    return router


def fail_attempt(
    router: Router, request_id: str, failure: Failure | None, now_s: float, **options: Any
) -> list[Decision]:
    """Report that the one engine which has a request, or else r0, did not carry it through."""
    replica_ids = [attempt.replica.id for attempt in router._attempts.of(request_id)]
    [replica_id] = replica_ids or ["r0"]
    return router.failures.on_attempt_failed(request_id, replica_id, failure, now_s, **options)


def after_json(state):
    """What JSON makes of a state: the same, or it had a number that JSON does not know."""
    decoded = msgspec.json.decode(msgspec.json.encode(state), type=type(state))
    assert decoded == state
    return decoded


def small_profile() -> Profile:
    """A made-up engine whose steps take 5 ms and 20 µs a token."""
    return Profile(
        name="test",
        model="small",
        device="none",
        source="made up",
        max_model_len=32_000,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        num_kv_tokens=64_000,
        base_s=0.005,
        s_per_token=2e-5,
    )
