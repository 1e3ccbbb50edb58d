"""What is measured: whole systems, started as a user would, and engines to put behind them.

Called by the benchmarks that need a running service, and ended with them.
"""
