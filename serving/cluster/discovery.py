"""Which engines and gateways are there? Ray Serve tells when replicas come and go."""

import contextlib
from collections.abc import Callable

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.request_router import RequestRouter

Members = dict[str, dict]  # by replica id: the metadata that it has recorded


class Directory:
    """The replicas of one kind that Serve routes to, in this process."""

    def __init__(self) -> None:
        self._members: Members | None = None  # None until Serve has told
        self._subscribers: list[Callable[[Members], object]] = []

    def subscribe(self, on_change: Callable[[Members], object]) -> None:
        """Call `on_change` with all replicas' metadata whenever they change, and now if known.

        The calls come from Serve's router thread.
        """
        self._subscribers.append(on_change)
        if self._members is not None:
            on_change(dict(self._members))

    def publish(self, members: Members) -> None:
        """Store the replicas and tell every subscriber."""
        self._members = members
        for on_change in self._subscribers:
            on_change(dict(members))


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

        discovery.engines.publish({r.replica_id.unique_id: r.replica_metadata for r in replicas})

    async def choose_replicas(self, candidate_replicas, pending_request=None):
        return [list(candidate_replicas)]


class GatewayDirectory(PowerOfTwoChoicesRequestRouter):
    """The same of the gateways, in each of them; in Serve's proxy it routes as Serve does."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        with contextlib.suppress(ImportError):  # a proxy needs nothing of ours
            from serving.cluster import discovery

            members = {r.replica_id.unique_id: r.replica_metadata for r in replicas}
            discovery.gateways.publish(members)
