"""Capacity: how many engines of a model there should be, and which of them are emptied.

Called once a second or so by whoever can start and stop engines: Ray Serve's controller, by way of
`serving.cluster.actors`, and the simulator.
"""
