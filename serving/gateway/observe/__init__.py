"""What can be seen of a gateway: its state, its metrics, a line per request, traces.

Of several gateways all are seen together, by `peers`. What admins order is agreed on there; nothing
else is decided here. The driver and each call tell of what happens, people and programs ask.
"""
