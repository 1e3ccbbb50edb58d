"""What do a cluster's nodes have, and is all there that engines and gateways will read?

A task on each alive node looks: Ray itself counts GPUs and logical CPUs, and knows neither the
memory of a GPU nor what is installed.
"""

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serving.config import Config, ConfigError
from serving.gateway.http.endpoint import is_loopback
from serving.planning.hardware import Hardware, detect_hardware
from serving.planning.machine.nodes import Node, Nodes, head_of

_HEAD = "node:__internal_head__"  # a resource of the head node alone
_LOOK_S = 60.0  # for a node to start a process and answer


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one node has."""

    hardware: Hardware
    version: str  # of Headway
    has_vllm: bool
    missing: tuple[str, ...]  # of the paths that were asked about


def nodes_of_ray(config: Config, known: Iterable[str] = ()) -> Nodes:
    """Return the alive nodes of the Ray that this process is connected to. It blocks for seconds.

    Those whose ids are `known` are left out. Raise `ConfigError` for a node on which the
    configuration's engines or gateways could not start.
    """
    left_out = set(known)
    infos = [info for info in ray.nodes() if info["Alive"] and info["NodeID"] not in left_out]
    infos.sort(key=lambda info: (_HEAD not in info["Resources"], info["NodeManagerAddress"]))
    models, files = _model_folders(config), _gateway_files(config)
    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    asked = [
        look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(info["NodeID"], soft=False)
        ).remote([*models, *files])
        for info in infos
    ]
    nodes = []
    for info, answer in zip(infos, asked, strict=True):
        name = info["NodeManagerAddress"]
        try:
            seen: _Seen = ray.get(answer, timeout=_LOOK_S)
        except ray.exceptions.GetTimeoutError:
            raise ConfigError(
                f"the node {name} has not started a process within {_LOOK_S:.0f} s: take it out "
                "of the cluster, or see Ray's logs there"
            ) from None
        except ray.exceptions.RayError as error:
            cause = " ".join(str(error).strip().splitlines()[-1:])
            raise ConfigError(
                f"the node {name} cannot run what is to run there; is Headway installed on it, "
                f"with the same Python and Ray? ({cause})"
            ) from None
        nodes.append(_node(info, seen))
        _check(config, nodes[-1], seen, models, files)
    return tuple(nodes)


def check_network(config: Config, nodes: Sequence[Node]) -> None:
    """Raise `ConfigError` for what must not, or cannot, go over the network between the nodes."""
    if len(nodes) < 2:
        return
    leave = [node.name for node in nodes if not is_loopback(node.name)]
    if config.engine.tls == "off" and leave and not config.gateway.insecure:
        raise ConfigError(
            f"engine.tls: off sends prompts and replies in the clear to {leave[0]}: leave it at "
            "auto, or say gateway.insecure (--insecure) where the network is yours alone"
        )
    if config.gateway.front == "own" and is_loopback(config.gateway.host):
        here = ray.get_runtime_context().get_node_id()
        head = head_of(nodes)
        if config.gateway.placement == "head" and head.node_id != here and leave:
            raise ConfigError(
                f"gateway.host: {config.gateway.host} is reached on the head node, {head.name}, "
                "alone: start the service there, or set gateway.host to an address of that node "
                "or 0.0.0.0"
            )


def _look(paths: Sequence[str]) -> _Seen:
    """Look at the node that this runs on."""
    # Ray hides GPUs from a task that has asked for none. How many there are for us it tells.
    hidden = os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    try:
        hardware = detect_hardware()
    finally:
        if hidden is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = hidden
    return _Seen(
        hardware,
        _version(),
        importlib.util.find_spec("vllm") is not None,
        tuple(path for path in paths if not Path(path).exists()),
    )


def _version() -> str:
    try:
        return importlib.metadata.version("headway")
    except importlib.metadata.PackageNotFoundError:  # it runs from its sources
        return ""


def _node(info: dict[str, Any], seen: _Seen) -> Node:
    resources = info["Resources"]
    num_gpus = int(resources.get("GPU", 0))
    hardware = replace(seen.hardware, gpus=seen.hardware.gpus[:num_gpus])
    return Node(
        info["NodeManagerAddress"],
        hardware,
        resources.get("CPU", 0.0),
        is_head=_HEAD in resources,
        node_id=info["NodeID"],
    )


def _check(
    config: Config, node: Node, seen: _Seen, models: Sequence[str], files: Sequence[str]
) -> None:
    """Raise `ConfigError` if something is not there that will be needed."""
    if seen.version != _version():
        raise ConfigError(
            f"the node {node.name} has Headway {seen.version or 'from sources'}, this one "
            f"{_version() or 'from sources'}: install the same one on all"
        )
    if node.can_work:
        for path in models:
            if path in seen.missing:
                raise ConfigError(
                    f"model: {path} is not on the node {node.name}: copy it there, to the same "
                    "path, or put it on a file system that all nodes have"
                )
        if not seen.has_vllm and any(each.engine.is_vllm for each in config.by_model()):
            raise ConfigError(
                f"vLLM is not installed on the node {node.name}: install headway[gpu] or "
                "headway[cpu] there, as here, or start Ray there with --num-cpus 0 --num-gpus 0"
            )
    has_gateways = node.is_head or config.gateway.placement == "nodes"
    if has_gateways and (missing := [path for path in files if path in seen.missing]):
        raise ConfigError(
            f"{missing[0]} is not on the node {node.name}, where gateways read it: copy it there, "
            "to the same path"
        )


def _model_folders(config: Config) -> list[str]:
    """Return the paths of models that are no names of the hub."""
    models = [each.model for each in config.by_model() if each.engine.is_vllm and each.model]
    return [
        os.path.abspath(os.path.expanduser(model))
        for model in models
        if model.startswith((".", "/", "~")) or Path(model).exists()
    ]


def _gateway_files(config: Config) -> list[str]:
    gateway = config.gateway
    paths = [config.auth.keys_file, gateway.tls_cert_file, gateway.tls_key_file]
    return [str(path) for path in paths if path is not None]
