"""Which routers is Headway compared with? One file each: how it is installed and started.

Each is a `SystemUnderTest`, started and ended by `benchmarks.peers`.
"""

from benchmarks.peers.routers.haproxy import HAProxy
from benchmarks.peers.routers.litellm import LiteLLM
from benchmarks.peers.routers.nginx import Nginx
from benchmarks.peers.routers.peer import Peer
from benchmarks.peers.routers.smg import Smg
from benchmarks.peers.routers.vllm_router import VllmRouter

PEERS: tuple[type[Peer], ...] = (VllmRouter, Smg, HAProxy, Nginx, LiteLLM)
