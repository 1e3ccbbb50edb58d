"""HTTP: the listener, limits for slow and hostile clients, request bodies, errors.

What is decided here: which connections and bodies are accepted, and how errors look to OpenAI
clients. Started by the gateway; knows nothing of routing.
"""
