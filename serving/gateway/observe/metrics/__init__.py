"""What Prometheus gets: of requests, of the state, of each engine and its hardware.

Nothing is decided here. The observer and the driver count; a scrape reads.
"""
