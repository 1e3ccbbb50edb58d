"""What answers beside the models: vLLM's other endpoints, model cards, health.

What is decided here: what becomes of each path, which engine is asked where nothing is computed,
and which one keeps a response. Used by the gateway's application and the request path.
"""
