"""How true the simulator is: the same traffic on real engines and on simulated ones."""
