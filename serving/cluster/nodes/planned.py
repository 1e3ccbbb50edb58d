"""What would run where, on the machines that are there? Errors show before anything starts."""

from typing import Any

import ray

from serving.cluster.nodes.look import check_network, nodes_of_ray
from serving.config import parse
from serving.engine.external.server import ExternalServer
from serving.gateway.http.endpoint import check_is_guarded
from serving.gateway.http.listener import make_tls_context
from serving.gateway.providers.credentials import read_api_keys
from serving.gateway.tenants.keys import read_keys
from serving.planning.hardware import detect_hardware
from serving.planning.machine.nodes import Nodes, this_machine
from serving.planning.service.over_nodes import plan_nodes
from serving.planning.service.service_plan import ServicePlan


def plan_application(args: dict[str, Any], nodes: Nodes | None = None) -> ServicePlan:
    """Return which engines would run where. Raise `ConfigError` if they, or gateways, cannot.

    Without `nodes` these are the Ray's that this process is connected to, if there are several;
    else it is this machine.
    """
    config = parse(args)
    if config.gateway.front == "own":  # who else listens is not told here
        check_is_guarded(
            config.gateway.host,
            has_keys=config.auth.keys_file is not None,
            insecure=config.gateway.insecure,
        )
    make_tls_context(config.gateway)  # an error in it shows before engines start
    if config.auth.keys_file is not None:
        read_keys(config.auth.keys_file)
    for provider in config.providers:
        read_api_keys(provider)
    for server in config.external:
        ExternalServer.check(server)
    if nodes is None and ray.is_initialized() and sum(each["Alive"] for each in ray.nodes()) > 1:
        nodes = nodes_of_ray(config)
    if nodes is None:
        nodes = this_machine(detect_hardware())
    else:
        check_network(config, nodes)
    return plan_nodes(config, nodes)
