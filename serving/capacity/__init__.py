"""How much engines carry: profiles of step times, sweeps, `headway whatif`.

What is decided here: how many engines some traffic needs, and what one engine's steps take.
Called by the command line and by the benchmarks.
"""
