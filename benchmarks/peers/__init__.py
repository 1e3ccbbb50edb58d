"""How does Headway compare with other routers in front of the same engines?

One file for each router, their engines, and the testbed that runs them side by side. Called by
`make bench-peers`; writes `results/peers-*`.
"""

from benchmarks.peers.haproxy import HAProxy
from benchmarks.peers.litellm import LiteLLM
from benchmarks.peers.nginx import Nginx
from benchmarks.peers.peer import Peer
from benchmarks.peers.smg import Smg
from benchmarks.peers.vllm_router import VllmRouter

PEERS: tuple[type[Peer], ...] = (VllmRouter, Smg, HAProxy, Nginx, LiteLLM)
