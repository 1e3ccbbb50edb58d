"""The pure core: decides which engine, when, and whether to wait.

Synchronous Python without clocks, input or output: events and `now_s` go in,
decisions come out. Shells (gateway, tests, simulator) carry them out.
"""
