"""Responses that need no engine: stored ones, and one generation shared by many.

What is decided here: whether two requests are the same, and whether a response may be kept. Asked
by the request path before the router.
"""
