"""What does a benchmark leave behind? Figures, targets, provenance and plots.

Called by every benchmark with what it measured; writes `benchmarks/results` when the benchmark
has run to its end.
"""
