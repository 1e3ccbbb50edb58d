"""Which engines and gateways are there, and what could not start? Ray Serve tells."""

import contextlib
from collections.abc import Callable

from ray import serve
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.request_router import RequestRouter

from serving.cluster.logs import start_failure

Members = dict[str, dict]  # by replica id: the metadata that it has recorded


class Directory:
    """The replicas of one kind that Serve routes to, in this process, of all their deployments."""

    def __init__(self) -> None:
        self._members: dict[str, Members] = {}  # by deployment, of which Serve has told
        self._subscribers: list[Callable[[Members], object]] = []

    def subscribe(self, on_change: Callable[[Members], object]) -> None:
        """Call `on_change` with all replicas' metadata whenever they change, and now if known.

        The calls come from Serve's router thread.
        """
        self._subscribers.append(on_change)
        if self._members:
            on_change(self._all())

    def publish(self, deployment: str, members: Members) -> None:
        """Store the replicas of a deployment and tell every subscriber of all there are."""
        self._members[deployment] = members
        everything = self._all()
        for on_change in self._subscribers:
            on_change(everything)

    def _all(self) -> Members:
        return {name: each for of in self._members.values() for name, each in of.items()}


engines = Directory()
gateways = Directory()


class EngineDirectory(RequestRouter):
    """Serve's request router of the engine deployment, in the gateway's process.

    It routes nothing: requests go over the stream. It exists because Serve
    tells it, by long poll, of every change of the replicas and of their metadata.
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        # Serve pickles this class by value, with a copy of the globals it
        # names; the import finds the module that the gateway subscribed to.
        from serving.cluster import discovery

        members = {r.replica_id.unique_id: r.replica_metadata for r in replicas}
        discovery.engines.publish(self._deployment_id.name, members)

    async def choose_replicas(self, candidate_replicas, pending_request=None):
        return [list(candidate_replicas)]


class GatewayDirectory(PowerOfTwoChoicesRequestRouter):
    """The same of the gateways, in each of them; in Serve's proxy it routes as Serve does."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        with contextlib.suppress(ImportError):  # a proxy needs nothing of ours
            from serving.cluster import discovery

            members = {r.replica_id.unique_id: r.replica_metadata for r in replicas}
            discovery.gateways.publish(self._deployment_id.name, members)


def start_failures(application: str) -> dict[str, str]:
    """Return the deployments of which no replica runs as none could start, and why. It blocks."""
    overview = serve.status().applications.get(application)
    failures = {}
    for name, deployment in overview.deployments.items() if overview is not None else ():
        why = start_failure(str(deployment.status.value), deployment.message)
        if why and not deployment.replica_states.get("RUNNING"):
            failures[name] = why
    return failures
