"""The model of the traffic: arrivals, lengths, sessions, shared prefixes.

What is decided here: which request comes when, how long it is and what it shares. Made from
traces by `serving.capacity.traces`, or from a seed.
"""
