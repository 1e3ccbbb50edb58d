"""Who sends: an HTTP client that measures, loops around it, mixes, hostile clients.

Called by the benchmarks with the address of the system under test.
"""
