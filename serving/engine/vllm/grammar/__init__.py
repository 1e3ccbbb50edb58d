"""Grammars that requests ask for, compiled in a process of their own first.

What is decided here: which take too much time or memory. Called by `serving.engine.vllm.engine` and
`serving.engine.vllm.patches`.
"""
