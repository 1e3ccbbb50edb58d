"""Calls to providers: clients, keys, what they answer, what they say of their limits.

What is decided here: whether a provider's answer is an answer, and what is passed on. Called by
the driver for `Fallback` decisions.
"""
