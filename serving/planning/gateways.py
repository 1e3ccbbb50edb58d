"""How many gateways does `gateway.replicas: auto` start?

A gateway is one process on one core. Several share the port; each sees a part of the requests and
knows of the others' only by what engines report. So there are as few as can carry the tokens that
the engines generate, and no more than there are cores which the engines leave.
"""

import math

from serving.config import Config

_MAX_PORT = 65_535
# Of engines on GPUs. An H100 that gave 5,500 tokens/s (8 B parameters, 256 streams) kept 0.17 of
# its gateway's core busy (docs/gpu.md): four of them 0.7, and what is left takes up bursts. Of
# engines that are somebody else's as many are taken to come to the same.
ENGINES_PER_GATEWAY = 4
# A core gives 210 tokens/s (SmolLM2-135M, 16 streams). So few come at a time that a token takes the
# gateway 50 µs: 0.01 of a core, so 64 of them 0.7 likewise.
CORE_ENGINES_PER_GATEWAY = 64


def plan_gateways(
    config: Config,
    num_engines: int,
    num_cores: int,
    *,
    cores_per_engine: float,
    per_gateway: float,
) -> tuple[int, list[str]]:
    """Return the number of gateways, and why, in sentences.

    One gateway carries `per_gateway` engines; each engine keeps `cores_per_engine` of this node's
    cores busy.
    """
    wanted = math.ceil(num_engines / per_gateway)
    num_free_cores = max(0, num_cores - round(num_engines * cores_per_engine))
    num_gateways = max(1, min(wanted, num_free_cores))
    if config.gateway.replicas != "auto":
        why = []
        if num_gateways > config.gateway.num_replicas:
            why = [f"gateway.replicas: auto would start {num_gateways} gateways."]
        return config.gateway.num_replicas, why
    because = f"one per {per_gateway:g} engines, whose tokens keep 0.7 of a core busy"
    if num_gateways < wanted:
        because = (
            f"the engines leave {num_free_cores} of {num_cores} cores; {wanted} would be {because}"
        )
    if config.gateway.metrics_port:
        num_ports = _MAX_PORT + 1 - config.gateway.metrics_port
        if num_ports < num_gateways:
            num_gateways = num_ports
            because = f"gateway.metrics_port leaves no port to more; {wanted} would be {because}"
    plural = "" if num_gateways == 1 else "s"
    return num_gateways, [f"{num_gateways} gateway{plural}: {because}."]
