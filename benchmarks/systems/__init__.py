"""What is measured? Whole systems, started as a user starts them, and engines to put behind them.

`headway serve` with real, emulated or null engines, an engine that fails on demand, and the
processes of a launch. Started and ended by the benchmarks; `tests/system` uses some, too.
"""
