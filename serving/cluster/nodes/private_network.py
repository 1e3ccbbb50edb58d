"""How do our own processes talk to each other, and who knows that one is a gateway of ours?

Each listens on the address of its node. What leaves the machine is encrypted, and a gateway shows a
certificate of the application's authority. The key of that is in Ray's own store, until the launch
or the cluster ends: who can read there may run anything anyhow. Processes that start later, on
nodes that come later, find the same. By its public API Ray has no store; this one is where Serve's
controller keeps its state.
"""

import json
from collections.abc import Mapping
from typing import NamedTuple

import ray
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_put,
)

from serving.config import Config
from serving.gateway.http.endpoint import is_loopback
from serving.stream.tls import Authority, Identity, make_authority, make_identity

_NAMESPACE = b"headway"


class PrivateNetwork(NamedTuple):
    """What this process listens by, and is known by, among those of its application."""

    host: str  # of this node
    authority: Authority | None  # None: in the clear

    @property
    def tls(self) -> bool:
        return self.authority is not None

    @property
    def clients(self) -> str:
        """The authority of those who may connect, PEM; empty without TLS."""
        return "" if self.authority is None else self.authority.certificate

    def identity(self) -> Identity | None:
        """Return what this process shows, as a gateway, to those that listen."""
        return None if self.authority is None else make_identity(self.authority)


def private_network(config: Config, application: str) -> PrivateNetwork:
    """Return how to listen on this node. It blocks."""
    host = ray.util.get_node_ip_address()
    leaves_machine = not is_loopback(host)
    tls = {"auto": leaves_machine, "on": True, "off": False}[config.engine.tls]
    return PrivateNetwork(host, authority_of(application) if tls else None)


def shown_to(members: Mapping[str, dict], identity: Identity | None) -> dict[str, dict]:
    """Return what Ray tells of replicas, with what we show to them."""
    return {name: {**each, "identity": identity} for name, each in members.items() if each}


def authority_of(application: str) -> Authority:
    """Return the application's authority; the first who asks makes it. It blocks."""
    key = _key(application)
    kept = _internal_kv_get(key, namespace=_NAMESPACE)
    if kept is None:
        content = json.dumps(make_authority()).encode()
        _internal_kv_put(key, content, overwrite=False, namespace=_NAMESPACE)
        kept = _internal_kv_get(key, namespace=_NAMESPACE)  # another's, if that came first
    assert kept is not None
    return Authority(*json.loads(kept))


def forget_authority(application: str) -> None:
    """Remove it: the application has ended."""
    _internal_kv_del(_key(application), namespace=_NAMESPACE)


def _key(application: str) -> bytes:
    return f"authority-{application}".encode()
