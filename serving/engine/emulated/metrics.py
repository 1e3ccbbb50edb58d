"""What does an emulated engine's `/metrics` say? Its state under vLLM 0.32's metric names."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from router.simulation.engine.model import EngineModel

_LABELS = ("model_name", "engine")
_GAUGES = {
    "vllm:num_requests_running": "num_running_reqs",
    "vllm:num_requests_waiting": "num_waiting_reqs",
    "vllm:kv_cache_usage_perc": "kv_cache_usage",  # a fraction, whatever its name says
}
_COUNTERS = {
    "vllm:prompt_tokens": "num_prefill_tokens_total",
    "vllm:generation_tokens": "num_output_tokens_total",
    "vllm:prefix_cache_queries": "num_prefix_queries_total",
    "vllm:prefix_cache_hits": "num_prefix_hits_total",
    "vllm:num_preemptions": "num_preemptions_total",
}


class _Collector:
    def __init__(self, model: EngineModel, name: str) -> None:
        self._model = model
        self._labels = (name, "0")

    def collect(self) -> Iterator[Metric]:
        snapshot = self._model.snapshot(0, 0)
        families = ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS))
        for family, names in families:
            for name, field in names.items():
                metric = family(name, "of an emulated engine", labels=_LABELS)
                metric.add_metric(self._labels, getattr(snapshot, field))
                yield metric


def render(model: EngineModel, name: str) -> bytes:
    """Return the present state in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(_Collector(model, name))
    return generate_latest(registry)
