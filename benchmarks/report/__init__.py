"""What every benchmark says: figures, targets, provenance, plots.

Called by every benchmark with what it measured; writes `benchmarks/results`.
"""
