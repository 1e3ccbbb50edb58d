"""Which policy is best: on two real engines, and simulated on many."""
