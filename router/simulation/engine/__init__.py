"""What would a vLLM engine compute in its next step, and how long would that take?

A model of its scheduler, KV cache, decode batch and step times. Stepped by the simulator's nodes,
and in real time by the emulated engine.
"""
