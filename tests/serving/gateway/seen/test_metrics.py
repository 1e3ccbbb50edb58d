"""Is what `/metrics` says right, and as Prometheus's own linter wants it?"""

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from router import Outcome, RejectReason, RequestClass, Usage
from router.resilience.resume import Records
from serving.gateway.exchange import Exchange
from serving.gateway.intake.fields import ChatFields
from serving.gateway.observe.metrics import requests as module
from serving.gateway.observe.metrics.renamed import _OLD_NAMES
from serving.gateway.observe.metrics.requests import Metrics
from tests.serving.gateway.seen.promlint import check_openmetrics, complaints, promtool_says
from tests.support.builders import req
from tests.support.provider_server import configured, serving
from tests.support.running_gateway import CHAT, System, running

OPENMETRICS = {"accept": "application/openmetrics-text; version=1.0.0"}


def exchange(is_stream: bool = True, usage: Usage | None = None, **fields) -> Exchange:
    fields = {"arrival_s": 9.0, **fields}
    args = (req("x", **fields), "POST", CHAT, [], b"{}", Records(0))
    made = Exchange(*args, fields=ChatFields(stream=is_stream), added={})
    made.usage = usage
    return made


def ended(outcome: Outcome, over_s: float, first_s: float = 0.0, reason: str = "", **fields):
    """An exchange that was sent to r0 at 10 s, and has ended."""
    made = exchange(**fields)
    journey = made.journey
    journey.places = [("r0", 10.0)]
    journey.outcome, journey.over_s, journey.first_token_s = outcome, over_s, first_s
    journey.reason = reason
    return made


def values(metrics: Metrics, *names: str) -> dict[tuple, float]:
    """The samples of these names, by name and labels other than the gateway's."""
    found = {}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            if sample.name in names:
                labels = tuple(v for k, v in sorted(sample.labels.items()) if k != "gateway")
                found[sample.name, *labels] = sample.value
    return found


async def asked_metrics(system: System, headers: dict | None = None) -> str:
    """All metrics of a gateway that has had every kind of thing to count."""
    for _ in range(2):
        await system.client.post(CHAT, json=system.chat(max_tokens=2))
    for server in system.servers:
        server.close()
    await system.until(lambda: not system.gateway.driver.engines.infos)
    await system.client.post(CHAT, json=system.chat(max_tokens=2))
    await system.add_engine()
    return (await system.client.get("/metrics", headers=headers)).text


async def test_durations_are_counted_as_the_library_counts_them():
    """Every histogram beside the library's own, over each bound and between."""
    metrics, registry = Metrics(rank=3), CollectorRegistry()
    numbers = sorted({*module.LATENCY_BUCKETS_S, 0.0, 0.0051, 7.0, 301.0})
    name, words = module._OF_A_REQUEST["resume_delay"]
    theirs = Histogram(
        name, words, ("gateway", "model", "class"), buckets=module.LATENCY_BUCKETS_S,
        registry=registry,
    )  # fmt: skip
    for model, kind in (("a", RequestClass.BATCH), ("b", RequestClass.STANDARD)):
        for number in numbers:
            metrics.observe_resume(req("x", model=model, priority_class=kind), number)
            theirs.labels("3", model, kind.value).observe(number)

    def lines(text: bytes) -> list[str]:
        of_it = re.findall(rf".*{name}.*", text.decode())
        return [line for line in of_it if "_created" not in line]  # Prometheus does without

    assert len(lines(metrics.render()[0])) == 2 * (len(module.LATENCY_BUCKETS_S) + 3) + 2
    assert lines(metrics.render()[0]) == lines(generate_latest(registry))


async def test_tokens_and_ends_are_counted_per_model_and_class():
    metrics = Metrics(rank=0)
    usage = Usage(num_prompt_tokens=10, num_cached_tokens=4, num_output_tokens=2)
    for model, of in (("a", usage), ("a", usage), ("b", usage), ("b", None)):
        metrics.observe_end(ended(Outcome.COMPLETED, 11.0, model=model, usage=of))
    metrics.observe_end(ended(Outcome.REJECTED, 11.0, model="a", reason="queue_full"))
    for name, count in (
        ("prompt_tokens", 10),
        ("cached_prompt_tokens", 4),
        ("generation_tokens", 2),
    ):
        found = values(metrics, f"headway_{name}_total")
        assert set(found.values()) == {count, 2 * count}
        assert found[f"headway_{name}_total", "standard", "a"] == 2 * count
    ends = values(metrics, "headway_requests_total")
    assert ends["headway_requests_total", "standard", "a", "completed"] == 2
    assert ends["headway_requests_total", "standard", "a", "rejected"] == 1
    assert sum(ends.values()) == 5
    refusals = values(metrics, "headway_refusals_total")
    assert refusals.keys() == {("headway_refusals_total", each.value) for each in RejectReason}
    assert refusals["headway_refusals_total", "queue_full"] == sum(refusals.values()) == 1
    # As it was called before, and without what it did not tell then.
    before = values(metrics, "headway_outcomes_total")
    assert before["headway_outcomes_total", "completed"] == 4
    assert sum(before.values()) == 5


async def test_times_of_a_stream():
    metrics = Metrics(rank=0)
    usage = Usage(num_output_tokens=5)
    stream = ended(Outcome.COMPLETED, 14.0, first_s=12.0, usage=usage)
    stream.journey.answered_by, stream.journey.predicted_ttft_s = "r0", 1.0
    metrics.observe_first_token(stream, 12.0)
    metrics.observe_end(stream)
    sums = {
        f"headway_{name}_sum": value
        for name, value in (
            ("time_to_first_token_seconds", 3.0),  # from its arrival at 9
            ("time_per_output_token_seconds", 0.5),  # four more in two seconds
            ("e2e_request_latency_seconds", 5.0),
            ("request_held_seconds", 1.0),
            ("time_to_first_token_prediction_ratio", 2.0),
        )
    }
    found = values(metrics, *sums)
    assert found == {(name, "standard", "m"): value for name, value in sums.items()}


async def test_what_comes_at_once_has_no_first_token():
    metrics = Metrics(rank=0)
    whole = ended(
        Outcome.COMPLETED, 14.0, 13.999, usage=Usage(num_output_tokens=5), is_stream=False
    )
    metrics.observe_first_token(whole, 13.999)
    metrics.observe_end(whole)
    counted = values(
        metrics,
        "headway_time_to_first_token_seconds_count",
        "headway_time_per_output_token_seconds_count",
        "headway_e2e_request_latency_seconds_count",
    )
    assert list(counted.values()) == [0, 0, 1]


async def test_a_request_that_was_never_sent_was_not_held():
    metrics = Metrics(rank=0)
    refused = ended(Outcome.REJECTED, 9.1, reason="queue_full")
    refused.journey.places = []
    metrics.observe_end(refused)
    assert set(values(metrics, "headway_request_held_seconds_count").values()) == {0}


async def test_promtool_would_not_complain():
    async with serving() as server, running(**configured(server)) as system:
        text = await asked_metrics(system)
        openmetrics = (await system.client.get("/metrics", headers=OPENMETRICS)).text
    assert list(complaints(text)) == []
    assert promtool_says(text) in (None, [])
    check_openmetrics(openmetrics)
    assert openmetrics.endswith("# EOF\n")
    assert "_created" not in text + openmetrics
    # What it judged were all of them, with what they count.
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    for name, kind in (
        ("headway_build_info", "gauge"),
        ("headway_engine_preemptions_total", "counter"),
        ("headway_engine_prefix_cache_hit_tokens_total", "counter"),
        ("headway_engine_prefill_rate_tokens_per_second", "gauge"),
        ("headway_engine_info", "gauge"),
        ("headway_requests_total", "counter"),
        ("headway_retries_total", "counter"),
        ("headway_fallbacks_total", "counter"),
        ("headway_provider_cost_total", "counter"),
        ("headway_prediction_error_ratio", "gauge"),
        ("process_cpu_seconds_total", "counter"),
        ("python_gc_collections_total", "counter"),
    ):
        assert kinds[name] == kind
        assert re.search(rf"^{name}[{{ ]", text, re.MULTILINE)
    assert re.search(
        r'^headway_prediction_error_ratio{[^}]*percentile="90",time="ttft"', text, re.MULTILINE
    )


async def test_old_names_show_the_same():
    async with serving() as server, running(**configured(server)) as system:
        text = await asked_metrics(system)
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for new, old in _OLD_NAMES.items():
        now, before = families[new], families[old.name]
        assert (now.type, bool(now.samples)) == (before.type, bool(before.samples))
        assert sum(s.value for s in now.samples) == sum(s.value for s in before.samples)
    assert {"replica", "gateway"} == set(
        families["headway_engine_num_running_reqs"].samples[0].labels
    )


async def test_models_that_nobody_serves_are_no_labels():
    async with running() as system:
        for number in range(5):
            reply = await system.client.post(CHAT, json=system.chat(model=f"made-up-{number}"))
            assert reply.status_code == 404
        assert "made-up" not in (await system.client.get("/metrics")).text


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
    assert promtool_says(text) != []  # None, or a complaint


def test_the_library_s_counters_are_as_ours():
    """A counter of theirs, so that this breaks when they name them otherwise."""
    registry = CollectorRegistry()
    words, labels = "Requests rejected or expired, by the reason", ("gateway", "reason")
    theirs = Counter("headway_refusals", words, labels, registry=registry)
    for reason in RejectReason:
        theirs.labels("0", reason.value).inc(float(reason is RejectReason.HOPELESS))
    metrics = Metrics(rank=0)
    metrics.observe_end(ended(Outcome.REJECTED, 11.0, reason="hopeless"))
    ours = re.findall(".*headway_refusals_total.*", metrics.render()[0].decode())
    assert ours == re.findall(".*headway_refusals_total.*", generate_latest(registry).decode())


async def test_the_reference_names_all_that_is_exported():
    async with serving() as server, running(**configured(server)) as system:
        text = await asked_metrics(system)
    old = {name.name for name in _OLD_NAMES.values()}
    exported = {
        (name, kind)
        for name, kind in re.findall(r"^# TYPE (headway_\S+) (\S+)$", text, re.MULTILINE)
        if name.removesuffix("_total") not in old
    }
    page = (Path(__file__).parents[4] / "docs" / "metrics.md").read_text()
    assert set(re.findall(r"^\| `(headway_\w+)` \| (\w+) \|", page, re.MULTILINE)) == exported
    renamed = dict(re.findall(r"^\| `(headway_\w+)` \| `(headway_\w+)` \|$", page, re.MULTILINE))
    assert renamed == {old.name: new for new, old in _OLD_NAMES.items()}
