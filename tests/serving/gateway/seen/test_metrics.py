"""Is what `/metrics` says as Prometheus's own linter wants it?"""

import re
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from router import Usage
from serving.gateway.observe.metrics import LATENCY_BUCKETS_S as BUCKETS_S
from serving.gateway.observe.metrics import Metrics
from tests.support.builders import req
from tests.support.provider_server import configured, serving
from tests.support.running_gateway import CHAT, System, running

# The rules of `promtool check metrics` (util/promlint in Prometheus's Go client).
_ABBREVIATION = re.compile("s|ms|us|ns|sec|b|kb|mb|gb|tb|pb|m|h|d")
_TYPE = re.compile("counter|gauge|histogram|summary|untyped")
_NO_BASE_UNIT = re.compile(
    r"(minute|hour|day|week)s?"
    r"|(pico|nano|micro|milli|centi|deci|deca|hecto|kilo|kibi|mega|mibi|giga|gibi|tera|tebi|peta"
    r"|pebi)(ampere|byte|celsius|gram|joule|kelvin|meter|metre|mole|second|volt)s?"
)


def complaints(text: str) -> Iterator[str]:
    """What promtool says of this text, metric by metric."""
    names = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    yield from (f"{name}: twice" for name in set(names) if names.count(name) > 1)
    for metric in text_string_to_metric_families(text):
        yield from (f"{metric.name}: {words}" for words in _complaints_of(metric))


def _complaints_of(metric: Metric) -> Iterator[str]:
    words = metric.name.split("_")
    if not metric.documentation:
        yield "no help text"
    if metric.type != "counter" and metric.name.endswith("_total"):
        yield "no counter, and called _total"
    if metric.type == "counter" and not all(s.name.endswith("_total") for s in metric.samples):
        yield "a counter, and not called _total"
    if any(map(_ABBREVIATION.fullmatch, words)):
        yield "abbreviated unit"
    if any(map(_NO_BASE_UNIT.fullmatch, words)):
        yield "not the base unit"
    if any(map(_TYPE.fullmatch, words)):
        yield "its type in its name"
    if ":" in metric.name or re.search("[a-z][A-Z]", metric.name):
        yield "not snake_case"
    labels = {label for sample in metric.samples for label in sample.labels}
    if metric.type != "histogram" and ("le" in labels or metric.name.endswith("_bucket")):
        yield "no histogram, and looks like one"
    if metric.type not in ("histogram", "summary") and re.search("_(sum|count)$", metric.name):
        yield "neither histogram nor summary, and looks like one"
    if metric.type != "summary" and "quantile" in labels:
        yield "no summary, and has a quantile"
    yield from (f"label {label}: camelCase" for label in labels if re.search("[a-z][A-Z]", label))


async def asked_metrics(system: System) -> str:
    """All metrics of a gateway that has had every kind of thing to count."""
    for _ in range(2):
        await system.client.post(CHAT, json=system.chat(max_tokens=2))
    for server in system.servers:
        server.close()
    await system.until(lambda: not system.gateway.driver.engines.infos)
    await system.client.post(CHAT, json=system.chat(max_tokens=2))
    await system.add_engine()
    return (await system.client.get("/metrics")).text


def test_durations_are_counted_as_the_library_counts_them():
    metrics, registry = Metrics(rank=3), CollectorRegistry()
    title = "From arrival in the gateway to the first byte of the reply, hold time included"
    names = ("gateway", "model")
    theirs = Histogram(
        "headway_time_to_first_token_seconds", title, names, buckets=BUCKETS_S, registry=registry
    )
    for model, durations_s in (("a", (0.0, 0.005, 0.0051, 7.0, 300.0, 301.0)), ("b", (1.5,))):
        for duration_s in durations_s:
            metrics.observe_first_token(req("x", model=model, arrival_s=9.0), 9.0 + duration_s)
            theirs.labels("3", model).observe(9.0 + duration_s - 9.0)

    def lines(text: bytes) -> list[str]:
        of_it = re.findall(".*headway_time_to_first_token_seconds.*", text.decode())
        return [line for line in of_it if "_created" not in line]  # Prometheus does without

    assert lines(metrics.render()) == lines(generate_latest(registry))


def test_tokens_are_counted_per_model():
    metrics = Metrics(rank=0)
    usage = Usage(num_prompt_tokens=10, num_cached_tokens=4, num_output_tokens=2)
    for model, of in (("a", usage), ("a", usage), ("b", usage), ("b", None)):
        metrics.observe_finish(req("x", model=model), of, 1.0)
    text = metrics.render().decode()
    for name, num_tokens in (
        ("prompt_tokens", 10),
        ("cached_prompt_tokens", 4),
        ("generation_tokens", 2),
    ):
        for model, times in (("a", 2), ("b", 1)):
            line = f'headway_{name}_total{{gateway="0",model="{model}"}} {times * num_tokens}.0'
            assert line in text
    for model in ("a", "b"):
        counted = f'headway_e2e_request_latency_seconds_count{{gateway="0",model="{model}"}} 2.0'
        assert counted in text


async def test_promtool_would_not_complain():
    async with serving() as server, running(**configured(server)) as system:
        text = await asked_metrics(system)
    assert list(complaints(text)) == []
    # What it judged were all of them, with what they count.
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    for name, kind in (
        ("headway_engine_num_preemptions_total", "counter"),
        ("headway_engine_num_prefix_hits_total", "counter"),
        ("headway_engine_prefill_tokens_per_second", "gauge"),
        ("headway_engine_step_seconds", "gauge"),
        ("headway_outcomes_total", "counter"),
        ("headway_retries_total", "counter"),
        ("headway_fallbacks_total", "counter"),
        ("headway_provider_cost_total", "counter"),
        ("headway_prediction_error", "gauge"),
    ):
        assert kinds[name] == kind
        assert re.search(rf"^{name}[{{ ]", text, re.MULTILINE)
    assert re.search(
        r'^headway_prediction_error{[^}]*percentile="90",time="ttft"', text, re.MULTILINE
    )
    assert not re.search(r"^headway_engine_step_s\b", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "kind", "labels", "words"),
    [
        ("x_total", "gauge", "", "no counter, and called _total"),
        ("x_step_s", "gauge", "", "abbreviated unit"),
        ("x_milliseconds", "gauge", "", "not the base unit"),
        ("x_hours", "gauge", "", "not the base unit"),
        ("x_gauge", "gauge", "", "its type in its name"),
        ("xY", "gauge", "", "not snake_case"),
        ("x", "gauge", '{quantile="0.5"}', "no summary, and has a quantile"),
        ("x_count", "gauge", "", "neither histogram nor summary, and looks like one"),
        ("x_bucket", "gauge", '{le="1"}', "no histogram, and looks like one"),
        ("x_seconds", "gauge", '{nodeName="a"}', "label nodeName: camelCase"),
    ],
)
def test_the_linter_sees_what_promtool_does(name, kind, labels, words):
    text = f"# HELP {name} Of a test.\n# TYPE {name} {kind}\n{name}{labels} 1\n"
    assert list(complaints(text)) == [f"{name}: {words}"]
