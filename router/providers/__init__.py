"""Providers: what they cost, what is left of their limits, and when they are worth it.

What is decided here: which held or hopeless request goes to which provider, under which key.
Asked by the router after engines have been given what they have room for.
"""
