"""What fits on this machine: hardware, memory, the model's size, the model on board.

What is decided here: how many engines start, on which devices, with how much KV cache. Called by
the command line and the application before anything starts.
"""
