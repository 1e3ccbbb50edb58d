"""vLLM in the process of the replica, and all that we change in it.

What is decided here: vLLM's arguments, what its scheduler does with long prompts, what a snapshot
says. Started by `serving.cluster.ray_session.engine_deployment`; nothing else imports vLLM.
"""
