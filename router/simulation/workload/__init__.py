"""Which request arrives when, how long is it and what prefix does it share?

The model of the traffic: arrivals, lengths, sessions. Made from traces by
`serving.capacity.traces`, or from a seed.
"""
