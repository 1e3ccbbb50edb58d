"""What this machine can run: hardware, memory, the model's size, the bundled model.

What is decided here: how many engines start, on which devices, with how much KV cache. Called by
the command line and the application before anything starts.
"""
