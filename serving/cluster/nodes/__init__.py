"""A Ray of several nodes: what each has, what is planned on them, and who may talk to whom there.

Called by the launcher, by `serve run`, and by gateways and engines when they start.
"""
