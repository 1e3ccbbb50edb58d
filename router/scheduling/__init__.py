"""Which engine, and when: placement, reservations, load shedding, hedging.

What is decided here: where a request goes now, or that it waits. Called by the router with
whatever event may have made room.
"""
