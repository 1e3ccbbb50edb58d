"""What would the deployed router do in virtual time? The core's third shell.

Nothing is decided here about routing: gateways, a network and engines are modelled around the
same `Router` that serves. Called by `serving.capacity`, the benchmarks and the tests.
"""
