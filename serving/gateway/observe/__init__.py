"""What can be seen of a gateway: its state, its metrics, a line per request, traces.

Nothing is decided here. The driver and each call tell of what happens; people and programs ask.
"""
