"""What a node lacks is said before anything starts, by what tasks there would tell."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from serving.cluster.nodes import look
from serving.config import ConfigError, parse
from serving.planning.hardware import Gpu, Hardware

GIB = 1 << 30
GPUS = tuple(Gpu(index, "H100", 80 * GIB, 79 * GIB) for index in range(8))
HARDWARE = Hardware(tuple(range(16)), 64 * GIB, 64 * GIB, gpus=GPUS)


def id_of(name: str) -> str:
    """Return an id as Ray gives them, for a node of this name."""
    return name.encode().hex().ljust(56, "0")


class FakeRay:
    """Nodes, and what a task on each of them returns or raises."""

    exceptions = ray.exceptions

    def __init__(self, *nodes: str, here: str = "head") -> None:
        self.infos = [self.info(name) for name in nodes]
        self.answers: dict[str, Any] = {}  # by node; the rest is well
        self.missing: dict[str, set[str]] = {}
        self.here = here

    def info(self, name: str, num_gpus: float = 2.0) -> dict[str, Any]:
        resources = {"CPU": 8.0, "GPU": num_gpus}
        if name == "head":
            resources["node:__internal_head__"] = 1.0
        return {
            "NodeID": id_of(name),
            "Alive": True,
            "NodeManagerAddress": name,
            "Resources": resources,
        }

    def nodes(self) -> list[dict[str, Any]]:
        return self.infos

    def remote(self, **_: Any) -> Any:
        def options(scheduling_strategy: Any) -> Any:
            return SimpleNamespace(remote=lambda paths: (scheduling_strategy.node_id, paths))

        return lambda _: SimpleNamespace(options=options)

    def get(self, asked: tuple[str, list[str]], timeout: float) -> Any:
        node_id, paths = asked
        (node,) = [each["NodeManagerAddress"] for each in self.infos if each["NodeID"] == node_id]
        missing = tuple(path for path in paths if path in self.missing.get(node, ()))
        answer = self.answers.get(node, look._Seen(HARDWARE, look._version(), True, missing))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: id_of(self.here))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    found = FakeRay("10.0.0.2", "head")
    monkeypatch.setattr(look, "ray", found)
    return found


def test_the_head_is_first_and_gpus_are_those_that_ray_has(fake: FakeRay) -> None:
    fake.infos.append({**fake.info("10.0.0.3"), "Alive": False})
    head, other = look.nodes_of_ray(parse({}))
    assert (head.name, head.is_head, other.name, other.is_head) == ("head", True, "10.0.0.2", False)
    assert len(other.hardware.gpus) == 2
    assert other.num_cpus == 8
    assert [each.name for each in look.nodes_of_ray(parse({}), known=[id_of("head")])] == [
        "10.0.0.2"
    ]


def test_a_folder_that_is_not_there_is_said_with_the_node(fake: FakeRay, tmp_path: Path) -> None:
    fake.missing["10.0.0.2"] = {str(tmp_path)}
    with pytest.raises(ConfigError, match=rf"^model: {tmp_path} is not on the node 10\.0\.0\.2"):
        look.nodes_of_ray(parse({"model": str(tmp_path)}))
    fake.infos[0]["Resources"].clear()  # no engine is put there
    look.nodes_of_ray(parse({"model": str(tmp_path)}))
    look.nodes_of_ray(parse({"model": "org/model"}))


def test_files_of_gateways_have_to_be_where_gateways_are(fake: FakeRay, tmp_path: Path) -> None:
    keys = str(tmp_path / "keys")
    args: dict[str, Any] = {"auth": {"keys_file": keys}, "engine": "emulated"}
    fake.missing["10.0.0.2"] = {keys}
    look.nodes_of_ray(parse(args))
    with pytest.raises(ConfigError, match=r"keys is not on the node 10\.0\.0\.2, where gateways"):
        look.nodes_of_ray(parse({**args, "gateway": {"placement": "nodes"}}))
    fake.missing = {"head": {keys}}
    with pytest.raises(ConfigError, match="keys is not on the node head"):
        look.nodes_of_ray(parse(args))


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (look._Seen(HARDWARE, look._version(), False, ()), "vLLM is not installed on the node"),
        (look._Seen(HARDWARE, "0.0.1", True, ()), "has Headway 0.0.1, this one"),
        (ray.exceptions.GetTimeoutError("late"), "has not started a process within 60 s"),
        (ray.exceptions.RayError("No module named 'serving'"), "is Headway installed on it"),
    ],
)
def test_what_a_node_cannot_run(fake: FakeRay, answer: Any, line: str) -> None:
    fake.answers["10.0.0.2"] = answer
    with pytest.raises(ConfigError, match=line):
        look.nodes_of_ray(parse({"model": "org/model"}))


class TestNetwork:
    def test_in_the_clear_it_is_refused(self, fake: FakeRay) -> None:
        args: dict[str, Any] = {"engine": {"tls": "off"}, "gateway": {"host": "0.0.0.0"}}
        nodes = look.nodes_of_ray(parse(args))
        with pytest.raises(ConfigError, match=r"^engine\.tls: off sends prompts"):
            look.check_network(parse(args), nodes)
        look.check_network(parse(args), nodes[:1])
        args["gateway"]["insecure"] = True
        look.check_network(parse(args), nodes)

    def test_who_starts_it_has_to_reach_the_gateways(self, fake: FakeRay) -> None:
        nodes = look.nodes_of_ray(parse({}))
        look.check_network(parse({}), nodes)
        fake.here = "10.0.0.2"
        with pytest.raises(ConfigError, match=r"^gateway\.host: 127\.0\.0\.1 is reached on the"):
            look.check_network(parse({}), nodes)
        look.check_network(parse({"gateway": {"host": "0.0.0.0"}}), nodes)


def test_a_node_is_looked_at_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray hides GPUs from a task that asks for none, which must not hide them from the plan."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    seen_by: list[str | None] = []

    def detect() -> Hardware:
        seen_by.append(look.os.environ.get("CUDA_VISIBLE_DEVICES"))
        return HARDWARE

    monkeypatch.setattr(look, "detect_hardware", detect)
    seen = look._look([str(tmp_path), str(tmp_path / "absent")])
    assert seen_by == [None]
    assert look.os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert seen.missing == (str(tmp_path / "absent"),)
