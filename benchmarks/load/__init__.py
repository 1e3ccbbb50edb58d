"""Which requests are sent, when, and by what kind of client?

The mix of requests, open and closed loops, clients that return after a 429, hostile clients, and
the capacity found by sending. Called by the benchmarks with the URLs of a system under test.
"""
