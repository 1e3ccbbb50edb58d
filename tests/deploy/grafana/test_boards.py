"""Do boards and alerts ask for what there is? Each query, parsed and held against real scrapes."""

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deploy.grafana import boards
from serving.gateway.observe.metrics.state import StateCollector
from serving.gateway.tenants.keys import KeysFile, make_key
from tests.support.provider_server import configured, serving
from tests.support.running_gateway import CHAT, running

FOLDER = Path(boards.__file__).parent
ALERTS = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"][0]["rules"]
MACROS = (("$__rate_interval", "1m"), ("$job", ".*"), ("$model", ".*"))


def board_queries() -> list[str]:
    """The queries of the boards' files."""
    found = []
    for uid in boards.BOARDS:
        for panel in json.loads((FOLDER / f"{uid}.json").read_text())["panels"]:
            found += [target["expr"] for target in panel.get("targets", [])]
    return found


def selectors(query: str) -> Iterator[promql_parser.VectorSelector]:
    """The series that a query selects. Raises `ValueError` if it is no PromQL."""
    for macro, value in MACROS:
        query = query.replace(macro, value)
    yield from _selectors_in(promql_parser.parse(query))


def _selectors_in(node: object) -> Iterator[promql_parser.VectorSelector]:
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    elif isinstance(node, promql_parser.MatrixSelector):
        yield node.vector_selector
    elif isinstance(node, promql_parser.BinaryExpr):
        yield from _selectors_in(node.lhs)
        yield from _selectors_in(node.rhs)
    elif isinstance(node, promql_parser.Call):
        for each in node.args:
            yield from _selectors_in(each)
    elif isinstance(node, promql_parser.AggregateExpr | promql_parser.ParenExpr):
        yield from _selectors_in(node.expr)
    else:
        assert isinstance(node, promql_parser.NumberLiteral), node


def grouping_of(query: str) -> set[str]:
    """The labels by which a query groups."""
    return {
        label.strip()
        for labels in re.findall(r"\bby \(([^)]*)\)", query)
        for label in labels.split(",")
    }


@pytest.fixture(scope="module")
def scraped(tmp_path_factory) -> dict[str, list[dict[str, str]]]:
    """The labels of each series of a gateway with all there is to tell of, by name."""
    text = asyncio.run(_scrape(tmp_path_factory.mktemp("keys") / "keys.json"))
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            # Prometheus adds these two to what it scrapes.
            labels = {**sample.labels, "job": "headway", "instance": "127.0.0.1:9400"}
            found.setdefault(sample.name, []).append(labels)
    found["up"] = [{"job": "headway", "instance": "127.0.0.1:9400"}]
    return found


async def _scrape(keys_path: Path) -> str:
    with KeysFile(keys_path) as file:
        text, key = make_key("acme", admin=True)
        file.keys.append(key)
        file.save()
    headers = {"authorization": f"Bearer {text}"}
    async with (
        serving() as server,
        running(**configured(server), auth={"keys_file": str(keys_path)}) as system,
    ):
        for kind in ("interactive", "standard"):
            headers["x-headway-class"] = kind
            reply = await system.client.post(CHAT, json=system.chat(max_tokens=3), headers=headers)
            assert reply.status_code == 200
        # What shows only in an overload, of this model.
        state = system.gateway.state()
        state.is_overloaded["fake-model"] = False
        system.gateway.metrics._own.register(Overload(lambda: state))
        return (await system.client.get("/metrics", headers=headers)).text


class Overload(StateCollector):
    """Of a state, what shows only once a model's queue has been full."""

    def collect(self):
        return [each for each in super().collect() if each.name == "headway_overloaded"]


@pytest.mark.parametrize("query", [*board_queries(), *(rule["expr"] for rule in ALERTS)])
def test_what_is_asked_for_is_there(query, scraped):
    names = set()
    for selector in selectors(query):
        names.add(selector.name)
        if selector.name.startswith("vllm:"):
            assert _is_vllms(selector.name)
            continue
        series = scraped.get(selector.name)
        assert series, f"{selector.name} is not exported"
        for matcher in selector.matchers.matchers:
            values = {labels.get(matcher.name) for labels in series}
            assert None not in values, f"{selector.name} has no label {matcher.name}"
            if matcher.op == promql_parser.MatchOp.Equal:
                assert matcher.value in values, f"{matcher.value} is no {matcher.name}"
        assert grouping_of(query) <= series[0].keys() | {"le"}
    assert names


def _is_vllms(name: str) -> bool:
    """Whether vLLM's source has a metric of this name."""
    folder = Path(find_spec("vllm").origin).parent / "v1" / "metrics"
    source = "".join(path.read_text() for path in folder.glob("*.py"))
    return f'"{re.sub("_(bucket|total|sum|count)$", "", name)}"' in source


def test_every_board_is_as_its_source_says():
    for uid in boards.BOARDS:
        assert (FOLDER / f"{uid}.json").read_text() == boards.text_of(uid), (
            "python deploy/grafana/boards.py writes them anew"
        )


def test_panels_do_not_overlap():
    for uid in boards.BOARDS:
        cells = [
            (x, y)
            for panel in boards.board(uid)["panels"]
            for place in [panel["gridPos"]]
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        assert len(cells) == len(set(cells))
        assert max(x for x, _ in cells) < 24


def test_legends_name_labels_that_queries_keep():
    for _, rows in boards.BOARDS.values():
        for _, panels in rows:
            for _, _, by_legend in panels:
                for legend, query in by_legend.items():
                    named = set(re.findall(r"{{(\w+)}}", legend))
                    assert named <= grouping_of(query) | {"gateway"}


def test_alerts_are_whole():
    names = [rule["alert"] for rule in ALERTS]
    assert len(set(names)) == len(names)
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"]
        named = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert named <= grouping_of(rule["expr"]) | {"instance", "gateway"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize("what", [("rules", "alerts.yaml"), ("config", "prometheus.yaml")])
def test_promtool_has_nothing_to_say(what):
    kind, name = what
    subprocess.run(["promtool", "check", kind, FOLDER / name], check=True)


def test_a_query_that_asks_for_nothing_is_seen(scraped):
    for query, says in (
        ("sum(rate(headway_nothing_total[1m]))", "headway_nothing_total is not exported"),
        ('headway_requests_total{tenant="a"}', "has no label tenant"),
        ('headway_requests_total{outcome="lost"}', "lost is no outcome"),
    ):
        with pytest.raises(AssertionError, match=says):
            test_what_is_asked_for_is_there(query, scraped)
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        list(selectors("sum(rate(x[1m])"))
