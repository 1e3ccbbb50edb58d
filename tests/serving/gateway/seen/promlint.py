"""What does `promtool check metrics` say of a text? Its rules in Python, and itself if at hand."""

import re
import shutil
import subprocess
from collections.abc import Iterator

from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as strict_families,
)
from prometheus_client.parser import text_string_to_metric_families

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


def promtool_says(text: str) -> list[str] | None:
    """What promtool itself says of a text, line by line; None where there is no promtool."""
    if (promtool := shutil.which("promtool")) is None:
        return None
    done = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    return (done.stdout + done.stderr).splitlines()


def check_openmetrics(text: str) -> None:
    """Raise `ValueError` for what is no OpenMetrics, by the library's own strict parser."""
    for _ in strict_families(text):
        pass
