"""An engine without a model: vLLM's scheduler and KV cache at a profile's step times.

What is decided here: when each token of a simulated reply comes, in real time. Started in vLLM's
stead by `engine.factory`, or as a server of its own by `benchmarks.peers`.
"""
