"""How does Headway compare with other routers in front of the same engines?

One file for each router in `routers`, their engines, and the testbed that runs them side by side.
Called by `make bench-peers`; writes `results/peers-*`.
"""
