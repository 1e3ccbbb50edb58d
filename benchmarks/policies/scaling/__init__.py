"""How many engines, and when? Autoscalers compared in simulation.

Called by `make bench-scaling`.
"""
