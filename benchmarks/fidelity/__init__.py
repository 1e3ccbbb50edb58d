"""How true is the simulator? The same traffic on real engines and on simulated ones.

`__main__` measures two engines here, `recorded_runs` replays published runs. Called by
`make bench-fidelity`; writes `results/fidelity*` and `results/replay.json`.
"""
