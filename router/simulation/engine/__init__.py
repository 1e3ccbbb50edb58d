"""The model of a vLLM engine: its scheduler, KV cache, batch and step times.

What is decided here: what an engine would compute in its next step, and how long that takes.
Stepped by the simulator's nodes, and in real time by the emulated engine.
"""
