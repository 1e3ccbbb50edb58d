"""How long did the requests of the last minute take, by class and by engine?"""

from collections.abc import Iterable

import msgspec
import numpy as np

from router import Request, Usage
from serving.gateway.observe.journey import Journey

WINDOW_S = 60.0


class Quantiles(msgspec.Struct, frozen=True):
    """Of some times, seconds; the 99th percentile of fewer than a hundred is the largest."""

    p50: float
    p99: float


class LatencyView(msgspec.Struct, frozen=True, kw_only=True):
    """Of the streams of one class that ended within the window; None: there were none."""

    request_class: str
    num_requests: int  # ended, streams or not
    output_tokens_per_s: float
    ttft_s: Quantiles | None
    tpot_s: Quantiles | None
    predicted_ttft_s: Quantiles | None  # from when they were sent to an engine
    answered_in_s: Quantiles | None  # as it was, from the same moment


class LatencySamples(msgspec.Struct, frozen=True, kw_only=True):
    """The same of one gateway before it is summed up: times in seconds, as many as there were."""

    request_class: str
    num_requests: int
    num_output_tokens: int
    ttft_s: list[float]
    tpot_s: list[float]
    predicted_ttft_s: list[float]
    answered_in_s: list[float]


class EngineSamples(msgspec.Struct, frozen=True, kw_only=True):
    """First tokens of one engine to one gateway: seconds from when it was sent the requests."""

    predicted_ttft_s: list[float]
    answered_in_s: list[float]


class EngineLatency(msgspec.Struct, frozen=True, kw_only=True):
    """The same of all gateways' streams, summed up."""

    num_streams: int
    predicted_ttft_s: Quantiles
    answered_in_s: Quantiles


def engine_samples(
    over: Iterable[tuple[Request, Journey, Usage | None]], now_s: float
) -> dict[str, EngineSamples]:
    """Return the samples of each engine, or provider, that gave a first token in the window."""
    engines: dict[str, EngineSamples] = {}
    for _, journey, _ in over:
        if journey.over_s < now_s - WINDOW_S or not journey.predicted_ttft_s:
            continue
        if (took_s := journey.answered_in_s) is not None:
            if (samples := engines.get(journey.answered_by)) is None:
                samples = EngineSamples(predicted_ttft_s=[], answered_in_s=[])
                engines[journey.answered_by] = samples
            samples.predicted_ttft_s.append(journey.predicted_ttft_s)
            samples.answered_in_s.append(took_s)
    return engines


def engine_latencies(gateways: Iterable[dict[str, EngineSamples]]) -> dict[str, EngineLatency]:
    """Return the latencies of each engine, by its id, of the samples of all gateways."""
    engines: dict[str, list[EngineSamples]] = {}
    for each in gateways:
        for engine, samples in each.items():
            engines.setdefault(engine, []).append(samples)
    return {engine: _engine(samples) for engine, samples in engines.items()}


def _engine(samples: list[EngineSamples]) -> EngineLatency:
    predicted = _quantiles([value for each in samples for value in each.predicted_ttft_s])
    answered = _quantiles([value for each in samples for value in each.answered_in_s])
    assert predicted is not None
    assert answered is not None  # no samples are made without one
    return EngineLatency(
        num_streams=sum(len(each.answered_in_s) for each in samples),
        predicted_ttft_s=predicted,
        answered_in_s=answered,
    )


def latency_samples(
    over: Iterable[tuple[Request, Journey, Usage | None]], now_s: float
) -> list[LatencySamples]:
    """Return the samples of each class that ended requests in the window before `now_s`."""
    classes: dict[str, list[tuple[Request, Journey, Usage | None]]] = {}
    for each in over:
        if each[1].over_s >= now_s - WINDOW_S:
            classes.setdefault(each[0].priority_class.value, []).append(each)
    return [_samples(name, ended) for name, ended in classes.items()]


def latency_views(samples: Iterable[LatencySamples]) -> list[LatencyView]:
    """Return the view of each class, of the samples of all gateways."""
    classes: dict[str, list[LatencySamples]] = {}
    for each in samples:
        classes.setdefault(each.request_class, []).append(each)
    return [_view(name, classes[name]) for name in sorted(classes)]


def _samples(name: str, ended: list[tuple[Request, Journey, Usage | None]]) -> LatencySamples:
    ttfts, tpots, predicted, actual, num_tokens = [], [], [], [], 0
    for request, journey, usage in ended:
        num_output = usage.num_output_tokens if usage is not None else 0
        num_tokens += num_output
        if not journey.first_token_s:
            continue
        ttfts.append(journey.first_token_s - request.arrival_s)
        if (tpot_s := journey.time_per_token_s(num_output, request.num_sequences)) is not None:
            tpots.append(tpot_s)
        if journey.predicted_ttft_s and (took_s := journey.answered_in_s) is not None:
            predicted.append(journey.predicted_ttft_s)
            actual.append(took_s)
    return LatencySamples(
        request_class=name,
        num_requests=len(ended),
        num_output_tokens=num_tokens,
        ttft_s=ttfts,
        tpot_s=tpots,
        predicted_ttft_s=predicted,
        answered_in_s=actual,
    )


def _view(name: str, samples: list[LatencySamples]) -> LatencyView:
    return LatencyView(
        request_class=name,
        num_requests=sum(each.num_requests for each in samples),
        output_tokens_per_s=sum(each.num_output_tokens for each in samples) / WINDOW_S,
        ttft_s=_quantiles([value for each in samples for value in each.ttft_s]),
        tpot_s=_quantiles([value for each in samples for value in each.tpot_s]),
        predicted_ttft_s=_quantiles([value for each in samples for value in each.predicted_ttft_s]),
        answered_in_s=_quantiles([value for each in samples for value in each.answered_in_s]),
    )


def _quantiles(times_s: list[float]) -> Quantiles | None:
    if not times_s:
        return None
    p50, p99 = np.quantile(times_s, (0.5, 0.99), method="higher")
    return Quantiles(float(p50), float(p99))
