"""The router itself, and the life of a request in it.

What is decided here: what each event means for the request that it is about, and in which place
every open request is. Called by every shell, which carries out the decisions.
"""
