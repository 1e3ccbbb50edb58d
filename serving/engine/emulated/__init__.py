"""When does each token of a simulated reply come, in real time?

An engine without a model: vLLM's scheduler and KV cache at a profile's step times. Started in
vLLM's place by `engine.factory`, or as a server of its own by `benchmarks.peers`.
"""
