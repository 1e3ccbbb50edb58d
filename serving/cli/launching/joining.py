"""How does a launch use a Ray that is somebody else's, and how does it leave it?

It looks at the nodes before anything is planned. At the end it takes away its own application, what
that has shared between gateways, and Ray Serve where nobody else has anything on it. Ray stays.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from serving.cli.config_file import ConfigFile, check_with_ray
from serving.cluster.ray_session import RaySession, joined_session
from serving.gateway.http.endpoint import is_loopback
from serving.planning.machine.nodes import Nodes, head_of, working

# Actors that outlive the gateways for which they were started, by the beginning of their names.
_SHARED_ACTORS = ("leases-", "scaling-")
_ACTORS_NAMESPACE = "headway"


@dataclass(frozen=True, slots=True)
class Joined:
    """A Ray that runs already, and its nodes as they were before anything of ours was there."""

    file: ConfigFile
    session: RaySession
    nodes: Nodes

    def look(self, known: Iterable[str]) -> Nodes:
        """Return the nodes whose ids are not `known`. Raise `ConfigError` as at the start."""
        from serving.cluster.nodes.look import nodes_of_ray

        return nodes_of_ray(self.file.config, known)

    def url(self, file: ConfigFile) -> str:
        """Return the URL by which this machine reaches a gateway."""
        config = file.config.gateway
        if file.haproxy or len(self.nodes) == 1 or is_loopback(config.host):
            return file.url
        if config.placement == "head":
            name = head_of(self.nodes).name
        else:
            name = working(self.nodes)[0].name
        if config.host not in ("0.0.0.0", "::"):
            return file.url
        scheme = file.url.partition("://")[0]
        return f"{scheme}://{f'[{name}]' if ':' in name else name}:{file.port}"


@contextlib.contextmanager
def join(file: ConfigFile, address: str, *, verbose: bool) -> Iterator[Joined]:
    """Connect to the Ray at `address`, and look at its nodes.

    Raise `StartError` if it cannot be reached, `ConfigError` if a node lacks what it needs.
    """
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1" if file.haproxy else "0"
    check_with_ray(file)
    runtime_env = file.application.get("runtime_env") or {}
    with joined_session(address, runtime_env, verbose) as session:
        from serving.cluster.nodes.look import check_network, nodes_of_ray

        nodes = nodes_of_ray(file.config)
        check_network(file.config, nodes)
        yield Joined(file, session, nodes)


def leave_cluster(app: str, session: RaySession) -> None:
    """Take away what the application `app`, which is deleted, has left; nothing of others."""
    import ray
    from ray import serve

    from serving.cluster.nodes.private_network import forget_authority

    with contextlib.suppress(Exception):  # as below
        forget_authority(app)
    for beginning in _SHARED_ACTORS:
        with contextlib.suppress(ValueError):  # there is none
            ray.kill(ray.get_actor(f"{beginning}{app}", namespace=_ACTORS_NAMESPACE))
    if not session.serve_was_running:
        with contextlib.suppress(Exception):  # Ray itself may have failed; the launch ends anyhow
            if not serve.status().applications.keys() - {app}:
                serve.shutdown()
