"""What can be seen of a gateway? Its state, on request, and its metrics, by Prometheus.

Nothing is decided by them.
"""

import bisect
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from router import Request, Usage
from router.limits.sliding_window import WindowState
from router.providers.spillover import SpilloverState
from router.resilience.breaker import BreakerState
from serving.gateway.observe.state import GatewayState
from serving.gateway.tenants.tenants import Consumption

# From the first token of an idle GPU to a long wait behind long prompts.
LATENCY_BUCKETS_S = (
    *(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 300.0),
)


class _Durations:
    """Durations, counted as a histogram of Prometheus's is."""

    __slots__ = ("_counts", "_sum_s")

    def __init__(self) -> None:
        self._counts = [0] * (len(LATENCY_BUCKETS_S) + 1)  # the last of what is beyond them all
        self._sum_s = 0.0

    def observe(self, duration_s: float) -> None:
        self._counts[bisect.bisect_left(LATENCY_BUCKETS_S, duration_s)] += 1
        self._sum_s += duration_s

    def add_to(self, metric: HistogramMetricFamily, model: str) -> None:
        """Add what was counted of one model."""
        bounds = [*map(floatToGoString, LATENCY_BUCKETS_S), "+Inf"]
        totals = map(float, itertools.accumulate(self._counts))
        metric.add_metric([model], list(zip(bounds, totals, strict=True)), self._sum_s)


class _ModelCounts:
    """What is counted of the requests to one model."""

    __slots__ = ("cached_tokens", "e2e", "output_tokens", "prompt_tokens", "resume_delay", "ttft")

    def __init__(self) -> None:
        self.ttft = _Durations()
        self.e2e = _Durations()
        self.resume_delay = _Durations()
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0


class Metrics:
    """Count requests and tokens; time first tokens and whole requests.

    In plain numbers: the library's own counters, made for many threads, take as long as parsing
    a short request.
    """

    def __init__(self, rank: int) -> None:
        """`rank` tells this gateway from others: a restarted one has that of its predecessor."""
        self._gateway = str(rank)
        self._by_model: defaultdict[str, _ModelCounts] = defaultdict(_ModelCounts)
        self.registry = CollectorRegistry()
        self.registry.register(_RequestCollector(self._by_model))

    def observe_first_token(self, request: Request, now_s: float) -> None:
        self._by_model[request.model].ttft.observe(now_s - request.arrival_s)

    def observe_resume(self, request: Request, delay_s: float) -> None:
        self._by_model[request.model].resume_delay.observe(delay_s)

    def observe_finish(self, request: Request, usage: Usage | None, now_s: float) -> None:
        counts = self._by_model[request.model]
        counts.e2e.observe(now_s - request.arrival_s)
        if usage is not None:
            counts.prompt_tokens += usage.num_prompt_tokens
            counts.cached_tokens += usage.num_cached_tokens
            counts.output_tokens += usage.num_output_tokens

    def export_state(self, state: Callable[[], GatewayState]) -> None:
        """Export the gateway's state, read at every scrape."""
        self.registry.register(_StateCollector(state))

    def render(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(_OfGateway(self.registry, self._gateway))


class _OfGateway(Collector):
    """The metrics of one of several gateways, each of which counts for itself."""

    def __init__(self, metrics: Collector, gateway: str) -> None:
        self._metrics = metrics
        self._labels = {"gateway": gateway}

    def collect(self) -> Iterable[Metric]:
        for metric in self._metrics.collect():
            metric.samples = [
                sample._replace(labels=self._labels | sample.labels) for sample in metric.samples
            ]
            yield metric


class _RequestCollector(Collector):
    """Turn what is counted per model into Prometheus's metrics whenever they are read."""

    _TIMES: ClassVar = {
        "ttft": (
            "headway_time_to_first_token_seconds",
            "From arrival in the gateway to the first byte of the reply, hold time included",
        ),
        "e2e": (
            "headway_e2e_request_latency_seconds",
            "From arrival in the gateway to the end of the reply",
        ),
        "resume_delay": (
            "headway_resume_delay_seconds",
            "From an engine's failure under a begun reply to the next byte from another",
        ),
    }
    _TOKENS: ClassVar = {
        "prompt_tokens": ("headway_prompt_tokens", "Prompt tokens served"),
        "cached_tokens": (
            "headway_cached_prompt_tokens",
            "Prompt tokens found in a prefix cache",
        ),
        "output_tokens": ("headway_generation_tokens", "Tokens generated"),
    }

    def __init__(self, by_model: Mapping[str, _ModelCounts]) -> None:
        self._by_model = by_model

    def collect(self) -> Iterable[Metric]:
        for what, (name, words) in self._TIMES.items():
            times = HistogramMetricFamily(name, words, labels=["model"])
            for model, counts in self._by_model.items():
                getattr(counts, what).add_to(times, model)
            yield times
        for what, (name, words) in self._TOKENS.items():
            tokens = CounterMetricFamily(name, words, labels=["model"])
            for model, counts in self._by_model.items():
                tokens.add_metric([model], getattr(counts, what))
            yield tokens


class _StateCollector(Collector):
    """Turn the state into Prometheus's gauges whenever they are read."""

    # Of an engine's snapshot, the field of each metric; names as promtool's linter wants them.
    _ENGINE_GAUGES: ClassVar = {
        "num_running_reqs": "num_running_reqs",
        "num_waiting_reqs": "num_waiting_reqs",
        "kv_cache_usage": "kv_cache_usage",
        "num_free_kv_tokens": "num_free_kv_tokens",
        "num_pending_prefill_tokens": "num_pending_prefill_tokens",
        "num_decode_context_tokens": "num_decode_context_tokens",
        "prefill_tokens_per_second": "prefill_tokens_per_s",
        "step_seconds": "step_s",
    }
    _ENGINE_COUNTERS: ClassVar = {
        "num_preemptions": "num_preemptions_total",
        "num_prefix_hits": "num_prefix_hits_total",
    }

    def __init__(self, state: Callable[[], GatewayState]) -> None:
        self._state = state

    def describe(self) -> Iterable[Metric]:
        return ()  # or registering would read the state already

    def collect(self) -> Iterable[Metric]:
        state = self._state()
        for kind, names in (
            (GaugeMetricFamily, self._ENGINE_GAUGES),
            (CounterMetricFamily, self._ENGINE_COUNTERS),
        ):
            for name, shown in names.items():
                metric = kind(f"headway_engine_{name}", name, labels=["replica"])
                for replica_id, replica in state.replicas.items():
                    if replica.snapshot is not None:
                        metric.add_metric([replica_id], getattr(replica.snapshot, shown))
                yield metric
        for name in ("num_requests", "num_tokens", "num_bytes"):
            value = getattr(state.held, name)
            yield GaugeMetricFamily(f"headway_held_{name}", f"hold queue: {name}", value=value)
        error = GaugeMetricFamily(
            "headway_prediction_error",
            "absolute relative error of predicted times, last 1,000 requests",
            labels=["time", "percentile"],
        )
        for time, accuracy in msgspec.structs.asdict(state.accuracy).items():
            for percentile, value in (("50", accuracy.error_p50), ("90", accuracy.error_p90)):
                if value is not None:
                    error.add_metric([time, percentile], value)
        yield error
        for field in msgspec.structs.fields(Consumption):
            usage = CounterMetricFamily(
                f"headway_tenant_{field.name}", f"{field.name} of a tenant", labels=["tenant"]
            )
            for name, tenant in state.tenants.by_name.items():
                usage.add_metric([name], getattr(tenant, field.name))
            yield usage
        breakers = GaugeMetricFamily(
            "headway_breaker_state",
            "1 for the state that the breaker is in",
            labels=["replica", "state"],
        )
        for replica_id, replica in state.replicas.items():
            for each in BreakerState:
                is_in = each is replica.breaker.state
                breakers.add_metric([replica_id, each.value], float(is_in))
        yield breakers
        yield CounterMetricFamily(
            "headway_retries", "attempts beyond the first", value=state.retries.num_made
        )
        yield GaugeMetricFamily(
            "headway_retry_budget", "retries left", value=state.retries.budget.balance
        )
        yield GaugeMetricFamily(
            "headway_record_bytes",
            "kept of what engines have generated for open requests",
            value=state.num_record_bytes,
        )
        overloaded = GaugeMetricFamily(
            "headway_overloaded", "1 while whoever would be late is refused", labels=["model"]
        )
        for model, is_overloaded in state.is_overloaded.items():
            overloaded.add_metric([model], float(is_overloaded))
        yield overloaded
        yield from _provider_metrics(state.fallback)
        cache = CounterMetricFamily(
            "headway_cache_requests", "requests by how the response cache took them", labels=["how"]
        )
        for verdict in ("hit", "miss", "join", "bypass"):
            cache.add_metric([verdict], getattr(state.cache, f"num_{verdict}"))
        yield cache
        for name in ("num_stored", "num_stored_bytes", "num_flight_bytes"):
            value = getattr(state.cache, name) or 0  # unset where Redis has it
            yield GaugeMetricFamily(f"headway_cache_{name}", f"cache: {name}", value=value)
        outcomes = CounterMetricFamily(
            "headway_outcomes", "requests by how they ended", labels=["outcome"]
        )
        for outcome, count in state.outcomes.items():
            outcomes.add_metric([outcome], count)
        yield outcomes


def _provider_metrics(fallback: SpilloverState) -> Iterable[Metric]:
    """Yield what providers have cost, how fast they are, and the used share of each limit."""
    labels = ["provider", "key"]
    cost = CounterMetricFamily("headway_provider_cost", "spent, as recorded", labels=labels[:1])
    ttft = GaugeMetricFamily("headway_provider_ttft_seconds", "usual, learned", labels=labels[:1])
    refused = CounterMetricFamily("headway_provider_refusals", "429s", labels=labels)
    closed = GaugeMetricFamily("headway_provider_breaker_closed", "traffic flows", labels=labels)
    used = GaugeMetricFamily(
        "headway_provider_limit_used_ratio", "of a limit", labels=[*labels, "limit"]
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
    yield CounterMetricFamily(
        "headway_fallbacks", "requests sent to providers", value=fallback.num_spilled
    )
