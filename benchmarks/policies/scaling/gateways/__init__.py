"""What do several gateways cost in time to first token, and how far does it go? Simulated.

Called by `make bench-gateways`. Nothing is decided here: the deployed router is simulated with
one gateway and with more before the same engines and the same requests.
"""
