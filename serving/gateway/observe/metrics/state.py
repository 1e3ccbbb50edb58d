"""What does Prometheus get of a gateway's state? Gauges and counters, read at every scrape."""

from collections.abc import Callable, Iterable
from typing import ClassVar

import msgspec
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from router.limits.sliding_window import WindowState
from router.providers.spillover import SpilloverState
from router.resilience.breaker import BreakerState
from serving.gateway.observe.metrics.hardware import hardware_metrics
from serving.gateway.observe.state import GatewayState


class StateCollector(Collector):
    """Turn the state into Prometheus's families whenever they are read.

    An engine has series only while it is connected: one that comes back has a new name.
    """

    # By metric: the field of an engine's snapshot, and its help.
    _ENGINE_GAUGES: ClassVar = {
        "running_requests": ("num_running_reqs", "Requests in the batch"),
        "waiting_requests": ("num_waiting_reqs", "Requests that wait in the engine"),
        "kv_cache_usage_ratio": ("kv_cache_usage", "Share of the KV cache in use, 0 to 1"),
        "free_kv_tokens": ("num_free_kv_tokens", "Room in the KV cache, tokens"),
        "pending_prefill_tokens": ("num_pending_prefill_tokens", "Prompt tokens yet to prefill"),
        "decode_context_tokens": ("num_decode_context_tokens", "Context of what is decoded"),
        "prefill_rate_tokens_per_second": ("prefill_tokens_per_s", "Prefill rate of late"),
        "step_duration_seconds": ("step_s", "Duration of the last scheduler step"),
    }
    _ENGINE_COUNTERS: ClassVar = {
        "preemptions": ("num_preemptions_total", "Requests that lost their KV cache to others"),
        "prefix_cache_hit_tokens": ("num_prefix_hits_total", "Prompt tokens found cached"),
        "prefix_cache_query_tokens": ("num_prefix_queries_total", "Prompt tokens looked up"),
        "prefill_tokens": ("num_prefill_tokens_total", "Tokens prefilled, again included"),
        "generation_tokens": ("num_output_tokens_total", "Tokens generated"),
        "steps": ("num_steps_total", "Scheduler steps"),
    }
    _TENANT_COUNTERS: ClassVar = {
        "requests": ("num_requests", "Requests admitted"),
        "refused_requests": ("num_refused", "Requests over one of the tenant's limits"),
        "prompt_tokens": ("num_prompt_tokens", "Prompt tokens charged"),
        "cached_prompt_tokens": ("num_cached_tokens", "Of these, found in a prefix cache"),
        "generation_tokens": ("num_output_tokens", "Generated tokens charged"),
    }

    def __init__(self, state: Callable[[], GatewayState]) -> None:
        self._state = state

    def collect(self) -> Iterable[Metric]:
        state = self._state()
        yield from self._engine_metrics(state)
        yield from hardware_metrics(state.hardware)
        yield from _gateway_metrics(state)
        for name, (field, words) in self._TENANT_COUNTERS.items():
            usage = CounterMetricFamily(f"headway_tenant_{name}", words, labels=["tenant"])
            for tenant, used in state.tenants.by_name.items():
                usage.add_metric([tenant], getattr(used, field))
            yield usage
        yield from _provider_metrics(state.fallback)

    def _engine_metrics(self, state: GatewayState) -> Iterable[Metric]:
        for kind, names in (
            (GaugeMetricFamily, self._ENGINE_GAUGES),
            (CounterMetricFamily, self._ENGINE_COUNTERS),
        ):
            for name, (field, words) in names.items():
                metric = kind(f"headway_engine_{name}", words, labels=["engine"])
                for engine, replica in state.replicas.items():
                    if replica.snapshot is not None:
                        metric.add_metric([engine], getattr(replica.snapshot, field))
                yield metric
        age = GaugeMetricFamily(
            "headway_engine_snapshot_age_seconds",
            "Since the engine last told its state",
            labels=["engine"],
        )
        ttft = GaugeMetricFamily(
            "headway_engine_predicted_ttft_seconds",
            "Predicted time to first token of the shortest prompt",
            labels=["engine"],
        )
        draining = GaugeMetricFamily(
            "headway_engine_draining", "1 while it takes nothing new", labels=["engine"]
        )
        breakers = GaugeMetricFamily(
            "headway_engine_breaker_state",
            "1 for the state that the breaker is in",
            labels=["engine", "state"],
        )
        infos = InfoMetricFamily("headway_engine", "What the engine is", labels=["engine"])
        for engine, replica in state.replicas.items():
            age.add_metric([engine], replica.age_s)
            ttft.add_metric([engine], replica.ttft_s)
            draining.add_metric([engine], float(replica.is_draining))
            for each in BreakerState:
                is_in = each is replica.breaker.state
                breakers.add_metric([engine, each.value], float(is_in))
            info = replica.info
            infos.add_metric(
                [engine], {"model": info.model, "device": info.device, "version": info.engine}
            )
        yield from (age, ttft, draining, breakers, infos)


def _gateway_metrics(state: GatewayState) -> Iterable[Metric]:
    """Yield what the gateway as a whole has and does."""
    held = state.held
    for name, words, value in (
        ("engines", "Engines that are connected", len(state.replicas)),
        ("client_connections", "Open connections of clients", state.num_connections),
        ("open_requests", "Requests that have not ended", state.num_open_requests),
        ("placed_requests", "Requests at engines", state.num_placed),
        ("held_requests", "Requests in the hold queue", held.num_requests),
        ("held_prompt_tokens", "Tokens of the prompts in the hold queue", held.num_tokens),
        ("held_bytes", "Size of the bodies in the hold queue", held.num_bytes),
        (
            "record_bytes",
            "Kept of what engines generated for open requests",
            state.num_record_bytes,
        ),
        ("incoming_bytes", "Received of incomplete bodies", state.num_incoming_bytes),
        ("retry_budget", "Retries left", state.retries.budget.balance),
        ("cache_stored_responses", "In the response cache", state.cache.num_stored or 0),
        ("cache_stored_bytes", "Size of the response cache", state.cache.num_stored_bytes or 0),
        ("cache_flight_bytes", "Kept of replies being generated", state.cache.num_flight_bytes),
        ("batches_running", "Batches that this gateway runs", state.batches.num_running),
        ("batch_open_lines", "Lines of batches at work", state.batches.num_open_lines),
    ):
        yield GaugeMetricFamily(f"headway_{name}", words, value=value)
    for name, words, value in (
        ("retries", "Attempts beyond the first", state.retries.num_made),
        ("fallbacks", "Requests sent to providers", state.fallback.num_spilled),
        ("batch_lines", "Lines of batches answered well", state.batches.num_completed_lines),
        ("batch_lines_failed", "Lines answered by an error", state.batches.num_failed_lines),
    ):
        yield CounterMetricFamily(f"headway_{name}", words, value=value)
    overloaded = GaugeMetricFamily(
        "headway_overloaded", "1 while whoever would be late is refused", labels=["model"]
    )
    for model, is_overloaded in state.is_overloaded.items():
        overloaded.add_metric([model], float(is_overloaded))
    yield overloaded
    error = GaugeMetricFamily(
        "headway_prediction_error_ratio",
        "Absolute relative error of predicted times, of the last 1,000 requests",
        labels=["time", "percentile"],
    )
    for time, accuracy in msgspec.structs.asdict(state.accuracy).items():
        for percentile, share in (("50", accuracy.error_p50), ("90", accuracy.error_p90)):
            if share is not None:
                error.add_metric([time, percentile], share)
    yield error
    yield from _model_metrics(state)
    cache = CounterMetricFamily(
        "headway_cache_requests", "Requests by how the response cache took them", labels=["how"]
    )
    for verdict in ("hit", "miss", "join", "bypass"):
        cache.add_metric([verdict], getattr(state.cache, f"num_{verdict}"))
    yield cache


def _model_metrics(state: GatewayState) -> Iterable[Metric]:
    """Yield what waits for each model, and how far its predictions are off."""
    held = GaugeMetricFamily(
        "headway_model_held_prompt_tokens",
        "Tokens of the prompts that wait for a model, by the name they ask for",
        labels=["model"],
    )
    for model, num_tokens in state.held.num_tokens_by_model.items():
        held.add_metric([model], num_tokens)
    yield held
    error = GaugeMetricFamily(
        "headway_model_prediction_error_ratio",
        "Absolute relative error of a model's predicted times, of its last 1,000 requests",
        labels=["model", "time", "percentile"],
    )
    for model, accuracies in state.accuracy_by_model.items():
        for time, accuracy in msgspec.structs.asdict(accuracies).items():
            for percentile, share in (("50", accuracy.error_p50), ("90", accuracy.error_p90)):
                if share is not None:
                    error.add_metric([model, time, percentile], share)
    yield error


def _provider_metrics(fallback: SpilloverState) -> Iterable[Metric]:
    """Yield what providers have cost, how fast they are, and the used share of each limit."""
    labels = ["provider", "key"]
    cost = CounterMetricFamily("headway_provider_cost", "Spent, as recorded", labels=labels[:1])
    ttft = GaugeMetricFamily(
        "headway_provider_ttft_seconds", "Usual time to first token, learned", labels=labels[:1]
    )
    refused = CounterMetricFamily("headway_provider_refusals", "429s", labels=labels)
    closed = GaugeMetricFamily(
        "headway_provider_breaker_closed", "1 while traffic flows", labels=labels
    )
    used = GaugeMetricFamily(
        "headway_provider_limit_used_ratio", "Used of a limit, 0 to 1", labels=[*labels, "limit"]
    )
    for name, provider in fallback.providers.items():
        cost.add_metric([name], provider.cost)
        ttft.add_metric([name], provider.ttft_s)
        for key_name, key in provider.keys.items():
            refused.add_metric([name, key_name], key.budget.num_refused)
            closed.add_metric([name, key_name], key.breaker.state is BreakerState.CLOSED)
            for limit in ("requests", "tokens", "cost_hour", "cost_day"):
                window: WindowState = getattr(key.budget, limit)
                used.add_metric([name, key_name, limit], window.share)
    yield from (cost, ttft, refused, closed, used)
