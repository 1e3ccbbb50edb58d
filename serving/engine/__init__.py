"""What a replica runs behind its stream: vLLM, or an emulation of it.

What is decided here: how an engine is configured, and what it reports of itself. Started by
`serving.cluster.engine_deployment`, called by `serving.stream.server`.
"""
