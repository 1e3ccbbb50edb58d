"""What does Prometheus get of a gateway's requests?

Counted here in plain numbers, and turned into prometheus-client's families when they are read.
The library's own `Histogram` and `Counter` guard each number by a lock: 2.7 µs for an observation
and 1.3 µs for a count (Python 3.11, a Xeon), of which a request has ten. That is more than all
that a request's cost may grow by for being seen. A test holds what is shown to be theirs.
"""

import bisect
import itertools
import platform
from collections.abc import Callable, Iterable
from importlib.metadata import version

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from router import Outcome, RejectReason, Request
from serving.core_form import form
from serving.gateway.exchange import Exchange
from serving.gateway.observe.metrics.renamed import with_old_names
from serving.gateway.observe.metrics.state import StateCollector
from serving.gateway.observe.state import GatewayState

# From the first token of an idle GPU to a long wait behind long prompts, seconds.
LATENCY_BUCKETS_S = (
    *(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 300.0),
)
# What waits for nothing is sent within the first.
HELD_BUCKETS_S = (0.001, *LATENCY_BUCKETS_S)
# From a small model on a fast GPU to a CPU core that shares its batch, seconds.
TPOT_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5),
)
RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)

_OF_A_REQUEST = {  # attribute of `RequestCounts`: name and help
    "ttft": (
        "headway_time_to_first_token_seconds",
        "From arrival in the gateway to the first token, time held included; streams only",
    ),
    "tpot": (
        "headway_time_per_output_token_seconds",
        "Mean time per output token after the first; streams only",
    ),
    "e2e": (
        "headway_e2e_request_latency_seconds",
        "From arrival in the gateway to the end of the reply",
    ),
    "held": (
        "headway_request_held_seconds",
        "From arrival in the gateway until it was first sent to an engine or provider",
    ),
    "ttft_ratio": (
        "headway_time_to_first_token_prediction_ratio",
        "Time to first token from sending, over its prediction: 2 is twice as late; streams only",
    ),
    "resume_delay": (
        "headway_resume_delay_seconds",
        "From an engine's failure under a begun reply to the next byte from another",
    ),
}
_TOKENS_OF_A_REQUEST = {
    "prompt_tokens": ("headway_prompt_tokens", "Prompt tokens served"),
    "cached_tokens": ("headway_cached_prompt_tokens", "Prompt tokens found in a prefix cache"),
    "output_tokens": ("headway_generation_tokens", "Tokens generated"),
}
_LABELS = ("model", "class")


class _Numbers:
    """Numbers, counted as Prometheus's histogram does."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)  # the last of what is beyond them all
        self._sum = 0.0

    def observe(self, number: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, number)] += 1
        self._sum += number

    def add_to(self, metric: HistogramMetricFamily, labels: tuple[str, ...]) -> None:
        """Add what was counted, under these labels."""
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        totals = map(float, itertools.accumulate(self._counts))
        metric.add_metric(labels, list(zip(bounds, totals, strict=True)), self._sum)


class RequestCounts:
    """What is counted of the requests of one class to one model."""

    __slots__ = (*_OF_A_REQUEST, *_TOKENS_OF_A_REQUEST, "outcomes")

    def __init__(self) -> None:
        self.ttft = _Numbers(LATENCY_BUCKETS_S)
        self.tpot = _Numbers(TPOT_BUCKETS_S)
        self.e2e = _Numbers(LATENCY_BUCKETS_S)
        self.held = _Numbers(HELD_BUCKETS_S)
        self.ttft_ratio = _Numbers(RATIO_BUCKETS)
        self.resume_delay = _Numbers(LATENCY_BUCKETS_S)
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.outcomes = dict.fromkeys(Outcome.__members__, 0)


class Metrics(Collector):
    """Count requests and tokens; time first tokens and whole requests."""

    def __init__(self, rank: int) -> None:
        """`rank` tells this gateway from others: a restarted one has that of its predecessor."""
        self._counts: dict[tuple[str, str], RequestCounts] = {}
        # From zero on, so that a rate shows the first of each.
        self._refusals = {reason.value: 0 for reason in RejectReason}
        self._statuses: dict[int, int] = {}
        self._own = CollectorRegistry()
        self._own.register(self)
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        GCCollector(registry=self._process)
        self._gateway = str(rank)

    # --- what is told ------------------------------------------------------

    def counts_of(self, request: Request) -> RequestCounts:
        """Return where a request is counted.

        Its model is one of those that are served: `ServedModels` has refused all others.
        """
        key = (request.model, request.priority_class._value_)
        counts = self._counts.get(key)
        if counts is None:
            counts = self._counts[key] = RequestCounts()
        return counts

    def observe_first_token(self, exchange: Exchange, now_s: float) -> None:
        """Time the first token of a stream; what comes at once has none."""
        if not exchange.fields.is_stream:
            return
        journey, counts = exchange.journey, self.counts_of(exchange.request)
        counts.ttft.observe(now_s - exchange.request.arrival_s)
        if journey.predicted_ttft_s and (took_s := journey.answered_in_s) is not None:
            counts.ttft_ratio.observe(took_s / journey.predicted_ttft_s)

    def observe_resume(self, request: Request, delay_s: float) -> None:
        """Time how long a reply stood still that another engine went on with."""
        self.counts_of(request).resume_delay.observe(delay_s)

    def observe_end(self, exchange: Exchange) -> None:
        """Count a request that has ended, however it did."""
        request, journey, usage = exchange.request, exchange.journey, exchange.usage
        counts = self.counts_of(request)
        outcome = journey.outcome
        assert outcome is not None
        counts.outcomes[outcome._name_] += 1
        if journey.places:
            counts.held.observe(journey.places[0][1] - request.arrival_s)
        if outcome is not Outcome.COMPLETED:
            if outcome is Outcome.REJECTED or outcome is Outcome.EXPIRED:
                self._refusals[journey.reason] += 1
            return
        counts.e2e.observe(journey.over_s - request.arrival_s)
        if usage is None:
            return
        counts.prompt_tokens += usage.num_prompt_tokens
        counts.cached_tokens += usage.num_cached_tokens
        counts.output_tokens += usage.num_output_tokens
        if exchange.fields.is_stream and (
            tpot_s := journey.time_per_token_s(usage.num_output_tokens, request.num_sequences)
        ):
            counts.tpot.observe(tpot_s)

    def observe_reply(self, status: int) -> None:
        """Count a reply to a request for a model by its HTTP status; 0: the client did not wait."""
        self._statuses[status] = self._statuses.get(status, 0) + 1

    # --- what is shown -----------------------------------------------------

    def export_state(self, state: Callable[[], GatewayState]) -> None:
        """Export the gateway's state, read at every scrape."""
        self._own.register(StateCollector(state))

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Return all metrics, and their content type: of the formats in `accept`, the best.

        No `_created` series in any: Prometheus takes them for gauges, and sees restarts without.
        """
        encode, content_type = choose_encoder(accept)
        return encode(_OfGateway(self._own, self._process, self._gateway)), content_type

    def collect(self) -> Iterable[Metric]:
        """Yield what is counted of requests."""
        for what, (name, words) in _OF_A_REQUEST.items():
            numbers = HistogramMetricFamily(name, words, labels=_LABELS)
            for key, counts in self._counts.items():
                getattr(counts, what).add_to(numbers, key)
            yield numbers
        for what, (name, words) in _TOKENS_OF_A_REQUEST.items():
            tokens = CounterMetricFamily(name, words, labels=_LABELS)
            for key, counts in self._counts.items():
                tokens.add_metric(key, getattr(counts, what))
            yield tokens
        ends = CounterMetricFamily(
            "headway_requests", "Requests by how they ended", labels=(*_LABELS, "outcome")
        )
        for key, counts in self._counts.items():
            for outcome, count in counts.outcomes.items():
                ends.add_metric((*key, Outcome[outcome].value), count)
        yield ends
        refusals = CounterMetricFamily(
            "headway_refusals", "Requests rejected or expired, by the reason", labels=("reason",)
        )
        for reason, count in self._refusals.items():
            refusals.add_metric((reason,), count)
        yield refusals
        replies = CounterMetricFamily(
            "headway_http_responses",
            "Replies to requests for a model by HTTP status; 0: the client left before any",
            labels=("code",),
        )
        for status, count in self._statuses.items():
            replies.add_metric((str(status),), count)
        yield replies
        build = {
            "version": version("headway"),
            "core": form(),
            "python": platform.python_version(),
        }
        yield InfoMetricFamily("headway_build", "What this gateway is", value=build)


class _OfGateway(Collector):
    """The metrics of one of several gateways, each of which counts for itself."""

    def __init__(self, own: Collector, process: Collector, gateway: str) -> None:
        self._own = own
        self._process = process
        self._labels = {"gateway": gateway}

    def collect(self) -> Iterable[Metric]:
        for metric in (*with_old_names(self._own.collect()), *self._process.collect()):
            metric.samples = [
                sample._replace(labels=self._labels | sample.labels) for sample in metric.samples
            ]
            yield metric
