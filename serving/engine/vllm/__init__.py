"""vLLM in the process of the replica, and all that we change in it (`patches`).

What is decided here: vLLM's arguments, what its scheduler does with long prompts, what a snapshot
says. Started by `serving.cluster.engine_deployment`; nothing else in `serving` imports vLLM.
"""
