"""A client while it is answered: what it is sent, and what it tells of itself meanwhile.

What is decided here: how a reply is written, by our own listener or by the ASGI server in front.
Called by the request path.
"""
