"""Under which old names are metrics still exported? Until the next release, beside the new ones."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from prometheus_client.core import Metric

_REPLICA = {"engine": "replica"}


class _Old(NamedTuple):
    name: str
    labels: Mapping[str, str | None]  # old labels by new ones; None: there was none, it is a sum


_OLD_NAMES = {  # by the new one, both without `_total`
    **{
        f"headway_engine_{new}": _Old(f"headway_engine_{old}", _REPLICA)
        for new, old in (
            ("running_requests", "num_running_reqs"),
            ("waiting_requests", "num_waiting_reqs"),
            ("kv_cache_usage_ratio", "kv_cache_usage"),
            ("free_kv_tokens", "num_free_kv_tokens"),
            ("pending_prefill_tokens", "num_pending_prefill_tokens"),
            ("decode_context_tokens", "num_decode_context_tokens"),
            ("prefill_rate_tokens_per_second", "prefill_tokens_per_second"),
            ("step_duration_seconds", "step_seconds"),
            ("preemptions", "num_preemptions"),
            ("prefix_cache_hit_tokens", "num_prefix_hits"),
        )
    },
    "headway_engine_breaker_state": _Old("headway_breaker_state", _REPLICA),
    "headway_held_requests": _Old("headway_held_num_requests", {}),
    "headway_held_prompt_tokens": _Old("headway_held_num_tokens", {}),
    "headway_held_bytes": _Old("headway_held_num_bytes", {}),
    "headway_prediction_error_ratio": _Old("headway_prediction_error", {}),
    "headway_tenant_requests": _Old("headway_tenant_num_requests", {}),
    "headway_tenant_refused_requests": _Old("headway_tenant_num_refused", {}),
    "headway_tenant_prompt_tokens": _Old("headway_tenant_num_prompt_tokens", {}),
    "headway_tenant_cached_prompt_tokens": _Old("headway_tenant_num_cached_tokens", {}),
    "headway_tenant_generation_tokens": _Old("headway_tenant_num_output_tokens", {}),
    "headway_cache_stored_responses": _Old("headway_cache_num_stored", {}),
    "headway_cache_stored_bytes": _Old("headway_cache_num_stored_bytes", {}),
    "headway_cache_flight_bytes": _Old("headway_cache_num_flight_bytes", {}),
    "headway_requests": _Old("headway_outcomes", {"model": None, "class": None}),
}


def with_old_names(metrics: Iterable[Metric]) -> Iterable[Metric]:
    """Yield all metrics, each that has an old name under that as well."""
    for metric in metrics:
        yield metric
        if (old := _OLD_NAMES.get(metric.name)) is not None:
            yield _as_before(metric, old)


def _as_before(metric: Metric, old: _Old) -> Metric:
    before = Metric(old.name, f"Old name of {metric.name}", metric.type)
    totals: dict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
    for sample in metric.samples:
        labels = {old.labels.get(label, label): value for label, value in sample.labels.items()}
        shown = tuple((label, value) for label, value in labels.items() if label is not None)
        totals[sample.name.removeprefix(metric.name), shown] += sample.value
    for (suffix, shown), value in totals.items():
        before.add_sample(old.name + suffix, dict(shown), value)
    return before
