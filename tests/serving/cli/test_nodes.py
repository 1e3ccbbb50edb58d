"""A launch on a Ray that others own: nodes leave and join, told by what Ray would say."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
from rich.console import Console

from serving.cli.config_file import load_config_file
from serving.cli.launching.joining import Joined
from serving.cli.launching.node_watch import NodeWatch
from serving.cli.launching.progress import AppState
from serving.cluster.ray_session import RaySession
from serving.config import ConfigError
from serving.planning.machine.listed import listed_nodes
from serving.planning.machine.nodes import Node, Nodes
from serving.planning.service.over_nodes import plan_nodes
from serving.planning.service.service_plan import ServicePlan

STATE = AppState("RUNNING", "", {})
GPUS = "2xH100-80GB"
SESSION = RaySession(is_private=False, serve_was_running=False, folder=None)


def node(name: str, entry: str = GPUS) -> Node:
    (found,) = listed_nodes(entry)
    return dataclasses.replace(found, name=name, node_id=f"id-{name}", is_head=name == "a")


class Cluster:
    """Ray's nodes, and what a launch deploys on them."""

    def __init__(self, *nodes: Node, **args: Any) -> None:
        self.there = list(nodes)
        self.broken = ""  # why nodes that join cannot be used
        self.looked = 0
        self.deployed: list[ServicePlan] = []
        self.console = Console(force_terminal=False, width=300)
        file = load_config_file(None, {"model": "org/m", **args})
        self.watch = NodeWatch(
            file,
            plan_nodes(file.config, nodes),
            nodes,
            self.console,
            look=self.look_at,
            deploy=lambda _args, plan, _leaving: self.deployed.append(plan),
            alive=lambda: {each.node_id: each.name for each in self.there},
        )

    def look_at(self, known: Iterable[str]) -> Nodes:
        self.looked += 1
        if self.broken:
            raise ConfigError(self.broken)
        return tuple(each for each in self.there if each.node_id not in set(known))

    def look(self) -> str:
        """What is said at a look."""
        with self.console.capture() as capture:
            self.watch.look(STATE)
        return capture.get()


class TestNodesThatJoin:
    def test_auto_counts_their_gpus_and_changes_nothing_else(self) -> None:
        cluster = Cluster(node("a"), node("b"))
        before = cluster.watch.plan.plans[0]
        assert cluster.look() == ""
        cluster.there.append(node("c", "4xH100-80GB"))
        said = cluster.look()
        assert "the node c has joined: 4 GPUs, 48 cores" in said
        assert "model org/m grows: from 4 to 8 engines" in said
        (deployed,) = cluster.deployed
        assert deployed.plans == (dataclasses.replace(before, num_replicas=8),)
        assert cluster.watch.plan is deployed
        assert cluster.look() == ""

    def test_a_number_stays(self) -> None:
        cluster = Cluster(node("a"), node("b"), replicas=3)
        cluster.there.append(node("c"))
        assert "has joined" in cluster.look()
        assert cluster.deployed == []

    def test_one_that_cannot_be_used_is_told_of_once(self) -> None:
        cluster = Cluster(node("a"), node("b"))
        cluster.there.append(node("c"))
        cluster.broken = "vLLM is not installed on the node c"
        assert "not used: vLLM is not installed on the node c" in cluster.look()
        assert (cluster.look(), cluster.looked) == ("", 1)
        cluster.broken = ""
        cluster.there.append(node("d"))
        assert "from 4 to 6" in cluster.look()  # without c

    def test_engines_that_would_be_others_are_not_started(self) -> None:
        cluster = Cluster(node("a", "4xCPU-16GB"), node("b", "4xCPU-16GB"), model=None)
        cluster.there.append(node("c", "4xCPU-4GB"))  # with a smaller KV cache
        assert "does not grow" in cluster.look()
        assert cluster.deployed == []


def test_a_lost_node_changes_no_number() -> None:
    cluster = Cluster(node("a"), node("b"))
    cluster.there.pop()
    assert "the node b is lost: its engines start where there is room" in cluster.look()
    assert cluster.watch.plan.plans[0].num_replicas == 4
    cluster.there.append(node("b"))
    said = cluster.look()
    assert "has joined" in said
    assert "grows" not in said  # what it had is waiting for it
    assert cluster.deployed == []


@pytest.mark.parametrize(
    ("options", "url"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"host": "0.0.0.0"}, "http://a:8000"),
        ({"host": "0.0.0.0", "gateway.placement": "nodes"}, "http://b:8000"),
        ({"host": "10.0.0.9"}, "http://10.0.0.9:8000"),
        ({"host": "0.0.0.0", "front": "haproxy", "gateway.front": "haproxy"}, None),
    ],
)
def test_the_url_is_that_of_a_gateway(options: dict[str, Any], url: str | None) -> None:
    options.pop("front", None)
    file = load_config_file(None, options)
    head = dataclasses.replace(node("a", "2xCPU-4GB"), num_cpus=0.0)
    joined = Joined(file, SESSION, (head, node("b")))
    assert joined.url(file) == (url or file.url)
