"""The process between clients and engines.

What is decided here: what a request's body means, and in which order its tenant, the response
cache, the router and the client's connection are asked. Started by `serving.cluster.application`.
"""
