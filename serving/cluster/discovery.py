"""Which engine replicas are there? Ray Serve tells when they come and go."""

from collections.abc import Callable

from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.request_router import RequestRouter

Members = dict[str, dict]  # metadata by replica id, as `EngineReplica` reports it

_members: Members = {}
_subscribers: list[Callable[[Members], object]] = []


def subscribe(on_change: Callable[[Members], object]) -> None:
    """Call `on_change` with all replicas' metadata now, and again whenever they change.

    The calls come from Serve's router thread.
    """
    _subscribers.append(on_change)
    on_change(dict(_members))


def publish(members: Members) -> None:
    """Store the replicas that Serve routes to and tell every subscriber."""
    _members.clear()
    _members.update(members)
    for on_change in _subscribers:
        on_change(dict(members))


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

        discovery.publish({r.replica_id.unique_id: r.replica_metadata for r in replicas})

    async def choose_replicas(self, candidate_replicas, pending_request=None):
        return [list(candidate_replicas)]
