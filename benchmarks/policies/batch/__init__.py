"""What do batches do to others, and how much do they add? Simulated.

Called by `make bench-batch`; writes `results/batch.json`.
"""
