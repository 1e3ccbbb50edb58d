"""HTTP: listening, guarding against slow and hostile clients, reading bodies, errors.

What is decided here: which connections and bodies are let in, and how errors look to OpenAI
clients. Started by the gateway; knows nothing of routing.
"""
