"""Which policy is best? Compared on two real engines, and in simulation on many.

Also what a provider is worth in a spike, and how fast the simulator is. Called by `make bench-real`
and others (`../README.md`); writes `results/real*`, `results/sim*` and `results/spill.json`.
"""
