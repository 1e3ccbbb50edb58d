"""What does our own code cost: per token, per request, per decision, per cached response?

Engines are without a model or left out, so that the rest is ours. Called by `make bench-overhead`,
`make bench-decision` and `make bench-cache`; writes `results/overhead.json` and others.
"""
