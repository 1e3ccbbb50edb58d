"""Which engine replicas there are: told by Ray Serve as they come and go."""

from collections.abc import Callable

from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.request_router import RequestRouter

Members = dict[str, dict]

_members: Members = {}
_subscribers: list[Callable[[Members], object]] = []


def subscribe(on_change: Callable[[Members], object]) -> None:
    """Call `on_change` with every replica's metadata now, and whenever they change.

    Called from Serve's router thread.
    """
    _subscribers.append(on_change)
    on_change(dict(_members))


def publish(members: Members) -> None:
    """Take in the replicas that Serve routes to."""
    _members.clear()
    _members.update(members)
    for on_change in _subscribers:
        on_change(dict(members))


class EngineDirectory(RequestRouter):
    """Serve's request router of the engine deployment, in the gateway's process.

    It routes nothing: requests go over the links. It is here because Serve
    tells it, by long poll, of every change of the replicas, metadata included.
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        # Serve pickles this class by value, with a copy of the globals it
        # names; the import finds the module that the gateway subscribed to.
        from serving.cluster import discovery

        discovery.publish({r.replica_id.unique_id: r.replica_metadata for r in replicas})

    async def choose_replicas(self, candidate_replicas, pending_request=None):
        return [list(candidate_replicas)]
