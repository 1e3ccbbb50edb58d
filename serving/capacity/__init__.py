"""How many engines does some traffic need, and how long do an engine's steps take?

Profiles of step times, sweeps of simulated runs, `headway whatif`, `headway profile`. Called by
the command line and by the benchmarks.
"""
