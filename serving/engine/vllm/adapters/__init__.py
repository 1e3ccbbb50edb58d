"""LoRA adapters of an engine: which are served, which are resident, what loading one took.

What is decided here: when an adapter's files are read, and what snapshots say of adapters. Called
by `serving.engine.vllm.engine`, and by vLLM in the worker.
"""
